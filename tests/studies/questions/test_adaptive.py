"""AdaLoRA at an equal final budget: the budget is kept to the rank, and nothing else is claimed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from studies.conftest import Here, ground_of, planted

from loralab.adapters.attach import attach
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.studies.prepare import base_of
from loralab.studies.questions import adaptive
from loralab.studies.study import Ground, Record

GROUND = Ground(study="adaptive", model="m", data="d")
ROWS = 200
LORA, ADALORA = "LoRA r=4", "AdaLoRA 6→4"
PATHS = [f"encoder.layer.{layer}.{module}" for layer in range(3) for module in ("query", "ffn.in")]


def test_arms_end_with_the_same_ranks_and_the_same_factor(tiny_bert_folder: Path, noise_file: Path) -> None:
    ground = ground_of("adaptive", tiny_bert_folder, noise_file, values=("1", "4", "8"))
    base = base_of(ground)
    found = adaptive.arms(ground, base)
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
    assert [arm.name for arm in adaptive.arms(replace(ground, quick=True, values=()), base)] == [LORA, ADALORA]
    for wrong in ("0", "x", "4.5", "-1"):
        with pytest.raises(ConfigError, match="final mean ranks"):
            adaptive.arms(replace(ground, values=(wrong,)), base)


def cubic(step: int, modules: int, steps: int) -> int:
    """Equation 14 of arXiv:2303.10512 as its code has it, for 6 → 4."""
    first, last = steps // 10, steps - 3 * steps // 10
    if step <= first:
        return 6 * modules
    if step >= last:
        return 4 * modules
    return int(4 * modules + 2 * modules * (1 - (step - first) / (last - first)) ** 3)


def test_ranks_left_follow_the_schedule_into_the_file(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    ground = ground_of(
        "adaptive",
        tiny_bert_folder,
        noise_file,
        fields={"max_steps": 20},
        rows={"train": 160, "validation": 20, "test": 40},
    )
    records = here(ground, tmp_path)
    moved = [r for r in records if adaptive.is_adaptive(r)]
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
    answer = adaptive.conclude(records, ground)
    assert answer.sentence.en.startswith(f"Yes: {ADALORA} went from 78 ranks to 52, exactly")
    assert not any(finding.holds for finding in answer.findings)
    assert [label.zh for label, _ in answer.blanks][-1] == "挑戰"
    assert "against" in answer.blanks[-1][1].en
    assert {figure.name for figure in answer.figures} == {"adaptive-budget", "adaptive-ranks"}


def adalora(right: float, ranks: Sequence[Sequence[int]], *, in_file: int = 24, name: str = ADALORA) -> list[Record]:
    """Planted records of AdaLoRA on six modules, one list of final ranks for each seed."""
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
    """Planted records of LoRA at the same budget."""
    scores = [float(row < right * ROWS) for row in range(ROWS)]
    return [replace(r, numbers={**r.numbers, "head_parameters": 10.0}) for r in planted(LORA, scores, rank=4)]


ALIKE = [[1, 6, 2, 6, 3, 6]] * 3


def test_a_better_score_is_claimed_and_advised() -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(0.8, ALIKE)], GROUND)
    assert f"{ADALORA} is better than {LORA} by 20.0 points" in answer.sentence.en
    assert answer.advice["method"] == "adalora"
    assert answer.advice["target_rank"] == 4


@pytest.mark.parametrize("right", [0.4, 0.6])
def test_what_is_not_better_is_not_advised(right: float) -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(right, ALIKE)], GROUND)
    assert answer.advice == {"method": "lora", "rank": 4}
    assert [finding.holds for finding in answer.findings] == [right < 0.6]
    text = answer.blanks[1][1].en
    assert "120 ms against 100 ms (+20%)" in text
    assert "in training 120 parameters against 90, stored 80 against 90" in text
    assert "12 of 20 steps train more ranks than are kept, and 8 are left" in text


def test_where_ranks_went_is_said_as_far_as_seeds_agree() -> None:
    said = adaptive.conclude(adalora(0.6, ALIKE), GROUND).blanks[0][1].en
    assert "most in ffn.in (6.0), least in query (2.0)" in said
    assert "by layer 0: 3.5, 1: 4.0, 2: 4.5" in said
    assert "correlation between seeds 1.00" in said
    opposite = [[1, 6, 2, 6, 3, 6], [6, 1, 5, 1, 4, 1]]
    assert adaptive.agreement(adalora(0.6, opposite)) == pytest.approx(-1)
    assert adaptive.agreement(adalora(0.6, [[4] * 6] * 2)) is None
    assert "one seed" in adaptive.conclude(adalora(0.6, ALIKE[:1]), GROUND).blanks[0][1].en


def test_a_budget_that_was_missed_is_said() -> None:
    answer = adaptive.conclude([*lora(0.6), *adalora(0.8, ALIKE, in_file=36)], GROUND)
    assert "Not as it should" in answer.sentence.en
    assert "holds 36" in answer.sentence.en


def test_paths_are_read_as_layer_and_module() -> None:
    assert adaptive.place_of("bert.encoder.layer.11.attention.self.query") == (11, "attention.self.query")
    assert adaptive.place_of("0.weight") == (0, "weight")
    assert adaptive.place_of("bert.pooler.dense") == (None, "bert.pooler.dense")


def test_what_was_not_measured_is_not_said() -> None:
    assert "not been measured" in adaptive.conclude([], GROUND).sentence.en
    assert "not been measured" in adaptive.conclude(lora(0.6), GROUND).sentence.en
    alone = adaptive.conclude(adalora(0.6, ALIKE), GROUND)
    assert "no LoRA of the same budget" in alone.sentence.en
    assert alone.advice == {}
    assert not alone.findings
    assert all(value.en and value.zh for _, value in alone.blanks)
