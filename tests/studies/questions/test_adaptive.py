"""AdaLoRA at an equal final budget: the budget is kept to the rank, and nothing else is claimed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of

from loralab.adapters.attach import attach
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.studies.places import place_of
from loralab.studies.prepare import base_of
from loralab.studies.questions import adaptive
from loralab.studies.questions.adaptive import agreement, is_adaptive
from loralab.studies.study import Record, StudySetup

SETUP = StudySetup(study="adaptive", model="m", data="d")
ROWS = 200
LORA, ADALORA = "LoRA r=4", "AdaLoRA 6→4"
PATHS = [f"encoder.layer.{layer}.{module}" for layer in range(3) for module in ("query", "ffn.in")]


def test_arms_end_with_the_same_ranks_and_the_same_factor(tiny_bert_folder: Path, noise_file: Path) -> None:
    setup = setup_of("adaptive", tiny_bert_folder, noise_file, values=("1", "4", "8"))
    base = base_of(setup)
    found = adaptive.arms(setup, base)
    assert len(found) == 3 * 4
    assert {arm.name for arm in found} >= {LORA, ADALORA, "AdaLoRA 2→1", "AdaLoRA 12→8 magnitude"}
    totals: dict[int, set[tuple[float, float]]] = {}
    for arm in found:
        method = configured(arm.fields)[0]
        adapter = attach(base.model, method)
        module = next(iter(adapter.modules.values()))
        rank = arm.fields.get("target_rank", arm.fields["rank"])
        totals.setdefault(rank, set()).add((rank * len(adapter.modules), module.scaling))
        adapter.detach()
    assert all(len(pairs) == 1 for pairs in totals.values())
    assert [arm.name for arm in adaptive.arms(replace(setup, quick=True, values=()), base)] == [LORA, ADALORA]
    for wrong in ("0", "x", "4.5", "-1"):
        with pytest.raises(ConfigError) as raised:
            adaptive.arms(replace(setup, values=(wrong,)), base)
        assert (raised.value.code, raised.value.field) == ("wrong_value", "values")


def cubic(step: int, modules: int, steps: int) -> int:
    """Compute equation 14 of arXiv:2303.10512 as its code has it, for 6 → 4."""
    first, last = steps // 10, steps - 3 * steps // 10
    if step <= first:
        return 6 * modules
    if step >= last:
        return 4 * modules
    return int(4 * modules + 2 * modules * (1 - (step - first) / (last - first)) ** 3)


def test_ranks_left_follow_the_schedule_into_the_file(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of(
        "adaptive",
        tiny_bert_folder,
        noise_file,
        fields={"max_steps": 20},
        rows={"train": 160, "validation": 20, "test": 40},
    )
    records = here(setup, tmp_path)
    moved = [r for r in records if is_adaptive(r)]
    assert len(moved) == 2 * 3
    for record in moved:
        numbers, modules = record.numbers, int(record.numbers["modules"])
        assert numbers["ranks_left"] == numbers["ranks_in_file"] == 4 * modules
        assert numbers["ranks_differ"] == 0
        by_hand = [cubic(step, modules, 20) for step in range(1, 21)]
        assert record.series["budget"] == record.series["schedule"] == by_hand
        assert numbers["steps_above"] == sum(count > 4 * modules for count in by_hand)
        assert sum(row["rank"] for row in record.tables["ranks"]) == 4 * modules
    # the first loss is the base model's: no regulariser in it, whatever the method
    for seed in (0, 1):
        assert len({record.series["loss"][0] for record in records if record.seed == seed}) == 1
    answer = adaptive.conclude(records, setup)
    kept = message_in(answer.sentence, "adaptive.kept").values
    assert (kept["arm"], kept["ranks_start"], kept["ranks_left"]) == (ADALORA, 42, 28)
    uniform = next(row for row in answer.tables[0].rows if row["arm"] == LORA)
    assert [uniform[f"ranks_{name}"] for name in ("start", "left", "in_file")] == [28] * 3
    assert uniform["stored_parameters"] == uniform["training_parameters"]
    assert not any(finding.holds for finding in answer.findings)
    assert [label for label, _ in answer.blanks] == [adaptive.WHERE, adaptive.CHALLENGES]
    assert {"adaptive.time", "adaptive.size", "adaptive.steps"} <= set(keys_in(answer.blanks[-1][1]))
    assert_it_renders(answer, "adaptive")
    assert {figure.name for figure in answer.figures} == {"adaptive-budget", "adaptive-ranks"}


def adalora(right: float, ranks: Sequence[Sequence[int]], *, in_file: int = 24, name: str = ADALORA) -> list[Record]:
    """Plant records of AdaLoRA on six modules, one list of final ranks for each seed."""
    scores = [float(row < right * ROWS) for row in range(ROWS)]
    fields = {"target_rank": 4, "rank": 6, "alpha": 24.0, "method": "adalora"}
    numbers = {
        "ranks_start": 36.0,
        "ranks_left": 24.0,
        "ranks_target": 24.0,
        "ranks_in_file": in_file,
        "ranks_differ": 0.0,
        "modules": 6.0,
        "steps": 20.0,
        "steps_above": 12.0,
        "head_parameters": 10.0,
        "stored_parameters": 80.0,
        "parameters": 130.0,
        "step_seconds": 0.12,
    }
    found = []
    for record in planted(name, scores, seeds=len(ranks)):
        rows = [{"module": m, "rank": r} for m, r in zip(PATHS, ranks[record.seed], strict=True)]
        found.append(
            replace(
                record,
                arm=replace(record.arm, fields=fields),
                numbers={**record.numbers, **numbers},
                tables={"ranks": rows},
                series={"loss": [0.7, 0.6], "budget": [36.0, 24.0], "schedule": [36.0, 24.0]},
            )
        )
    return found


def lora(right: float) -> list[Record]:
    """Plant records of LoRA at the same budget."""
    scores = [float(row < right * ROWS) for row in range(ROWS)]
    return [replace(r, numbers={**r.numbers, "head_parameters": 10.0}) for r in planted(LORA, scores, rank=4)]


ALIKE = [[1, 6, 2, 6, 3, 6]] * 3


def test_a_better_score_is_claimed_and_advised() -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(0.8, ALIKE)], SETUP)
    better = message_in(answer.sentence, "contrast.better").values
    assert (better["a"], better["b"]) == (ADALORA, LORA)
    assert better["size"].values["value"] == pytest.approx(0.2, abs=0.01)
    assert answer.advice["method"] == "adalora"
    assert answer.advice["target_rank"] == 4


@pytest.mark.parametrize("right", [0.4, 0.6])
def test_what_is_not_better_is_not_advised(right: float) -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(right, ALIKE)], SETUP)
    assert answer.advice == {"method": "lora", "rank": 4}
    assert [finding.holds for finding in answer.findings] == [right < 0.6]
    costs = answer.blanks[1][1]
    time = message_in(costs, "adaptive.time").values
    assert (time["ours"], time["theirs"], time["more"]) == pytest.approx((0.12, 0.1, 0.2))
    assert message_in(costs, "adaptive.size").values == {"training": 120, "stored": 80, "uniform": 90}
    assert message_in(costs, "adaptive.steps").values == {"above": 12, "count": 20, "left": 8}
    assert_it_renders(answer, "adaptive")


def test_where_ranks_went_is_said_as_far_as_seeds_agree() -> None:
    said = adaptive.conclude(adalora(0.6, ALIKE), SETUP).blanks[0][1]
    where = message_in(said, "adaptive.where").values
    assert (where["most"], where["most_rank"], where["least"], where["least_rank"]) == ("ffn.in", 6, "query", 2)
    layers = [part.values for part in message_in(said, "adaptive.by_layer").values["layers"]]
    assert layers == [{"layer": 0, "rank": 3.5}, {"layer": 1, "rank": 4}, {"layer": 2, "rank": 4.5}]
    assert message_in(said, "adaptive.agreement").values["correlation"] == pytest.approx(1)
    opposite = [[1, 6, 2, 6, 3, 6], [6, 1, 5, 1, 4, 1]]
    assert agreement(adalora(0.6, opposite)) == pytest.approx(-1)
    assert agreement(adalora(0.6, [[4] * 6] * 2)) is None
    assert "adaptive.one_seed" in keys_in(adaptive.conclude(adalora(0.6, ALIKE[:1]), SETUP).blanks[0][1])
    assert "adaptive.all_alike" in keys_in(adaptive.conclude(adalora(0.6, [[4] * 6] * 2), SETUP).blanks[0][1])


def test_a_budget_that_was_missed_is_said() -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(0.8, ALIKE, in_file=36)], SETUP)
    missed = message_in(answer.sentence, "adaptive.missed").values
    assert (missed["ranks_target"], missed["ranks_left"], missed["ranks_in_file"]) == (24, 24, 36)
    assert_it_renders(answer, "adaptive")


def test_paths_are_read_as_layer_and_module() -> None:
    assert place_of("bert.encoder.layer.11.attention.self.query") == (11, "attention.self.query")
    assert place_of("0.weight") == (0, "weight")
    assert place_of("bert.pooler.dense") == (None, "bert.pooler.dense")


def test_what_was_not_measured_is_not_said() -> None:
    for records in ([], lora(0.6)):
        empty = adaptive.conclude(records, SETUP)
        assert [empty.sentence.key, *(text.key for _, text in empty.blanks)] == ["answer.nothing"] * 3
    alone = adaptive.conclude(adalora(0.6, ALIKE), SETUP)
    assert "adaptive.no_rival" in keys_in(alone.sentence)
    assert alone.advice == {}
    assert not alone.findings
    assert_it_renders(alone, "adaptive")
