"""Starts of A and B: what they do is measured as it is, and nothing is said beyond it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of

from loralab.adapters.attach import attach
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.studies.measures.step_zero import Outputs, compared, norms, part_of, start_of
from loralab.studies.prepare import base_of
from loralab.studies.questions import init
from loralab.studies.study import Arm, Record, StudySetup, Trial

SETUP = StudySetup(study="init", model="m", data="d")
ROWS = 120


def outputs(draw: torch.Generator, rows: int) -> Outputs:
    return Outputs(
        losses=torch.rand(rows, generator=draw),
        logits=3 * torch.randn(rows, 5, generator=draw),
        features=torch.randn(rows, 7, generator=draw),
    )


def test_distances_are_those_of_the_formulas_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    before, after = ([outputs(draw, n) for n in (4, 3)] for _ in range(2))
    numbers, gained = compared(before, after)
    old, new = (torch.cat([o.logits for o in side]).double().numpy() for side in (before, after))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (old, new))
    assert numbers["start_kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    moved = np.linalg.norm(new - old) / np.linalg.norm(old)
    assert numbers["start_logits"] == pytest.approx(moved, rel=1e-6)
    losses = [torch.cat([o.losses for o in side]).numpy() for side in (before, after)]
    assert gained == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert compared(before, before)[0]["start_equal"] == 1


def test_gradients_of_the_parts_make_up_the_whole_before_clipping() -> None:
    clipped = {"a.lora_A": 0.3, "a.lora_B": 0.4, "b.lora_B": 0.2, "classifier.weight": 0.1}
    curves = norms([clipped], [10.0])
    found = np.array([curves[f"gradient_{part}"][0] for part in ("A", "B", "head")])
    assert np.linalg.norm(found) == pytest.approx(10)
    assert found[1] / found[0] == pytest.approx(np.hypot(0.4, 0.2) / 0.3)
    assert norms([dict.fromkeys(clipped, 0.0)], [0.0])["gradient_A"] == [0.0]


def test_embeddings_have_an_a_and_a_b_too() -> None:
    names = ("wte.lora_embedding_A", "wte.lora_embedding_B", "score.weight")
    assert [part_of(name) for name in names] == ["A", "B", "head"]


def test_every_arm_trains_as_many_numbers(tiny_bert_folder: Path, noise_file: Path) -> None:
    setup = setup_of("init", tiny_bert_folder, noise_file, values=("b_kaiming", "orthogonal"))
    base = base_of(setup)
    found = init.arms(setup, base)
    assert [arm.name for arm in found] == ["B = 0", "B Kaiming", "A orthogonal"]
    assert dict(found[0].fields) == {"method": "lora", "rank": 8}
    sizes = set()
    for arm in found:
        adapter = attach(base.model, configured(arm.fields)[0])
        sizes.add(adapter.num_parameters)
        adapter.detach()
    assert len(sizes) == 1
    with pytest.raises(ConfigError, match="b_kaiming") as raised:
        init.arms(replace(setup, values=("b_kaimin",)), base)
    assert (raised.value.code, raised.value.field) == ("invalid_choice", "values")


def test_zero_b_is_the_base_model_and_moves_b_alone(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of("init", tiny_bert_folder, noise_file)
    records = here(setup, tmp_path)
    own = {r.arm.name: r for r in records if r.seed == 0}
    zero, kaiming, pissa = own["B = 0"], own["B Kaiming"], own["PiSSA"]
    assert zero.numbers["start_equal"] == 1
    assert set(zero.items["start"]) == {0.0}
    assert zero.series["gradient_A"][0] == 0 < zero.series["gradient_B"][0]
    assert kaiming.numbers["start_logits"] > 0.1
    assert kaiming.series["gradient_A"][0] > 0
    assert 0 < pissa.numbers["start_logits"] < 1e-4
    assert zero.series["loss"][0] != kaiming.series["loss"][0]
    for record in records:
        parts = [record.series[f"gradient_{part}"] for part in ("A", "B", "head")]
        assert np.linalg.norm(parts, axis=0) == pytest.approx(record.series["grad_norm"], rel=1e-4)
    answer = init.conclude(records, setup)
    assert not any(finding.holds for finding in answer.findings)
    assert {"init.why_undecided", "init.why_equivalent"} & set(keys_in(answer.blanks[3][1]))
    assert [label for label, _ in answer.blanks] == list(init.LABELS)
    assert_it_renders(answer, "init")
    assert {figure.name for figure in answer.figures} == {"init-first-losses", "init-step-0", "init-gradients"}


def test_a_run_that_was_cut_off_is_watched_from_its_first_step(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of("init", tiny_bert_folder, noise_file, values=("kaiming", "pissa"), seeds=1)
    here(setup, tmp_path)
    for file in (tmp_path / "runs").glob("*/record.json"):
        file.unlink()  # its run folder is still there, finished
    found = here(setup, tmp_path)
    assert all(len(record.series["gradient_A"]) == len(record.series["loss"]) == 6 for record in found)


@pytest.mark.parametrize("rank", [1, 8])
def test_a_language_model_is_compared_where_it_has_labels(tiny_llama_folder: Path, sums_file: Path, rank: int) -> None:
    setup = setup_of("init", tiny_llama_folder, sums_file)
    found = {}
    for start in ("kaiming", "b_kaiming", "pissa"):
        arm = Arm(name=start, fields={"method": "lora", "rank": rank, "init": start})
        found[start], rows = start_of(Trial(measure="m", setup=setup, arm=arm, seed=1))
        assert found[start]["base_loss"] == found["kaiming"]["base_loss"]
        assert 0 < len(rows) <= setup.rows["test"]
    assert found["kaiming"]["start_equal"] == 1
    assert found["pissa"]["start_logits"] < 1e-4 < found["b_kaiming"]["start_logits"]


def started(name: str, share: float, gains: list[float], accuracy: float, **more: float) -> list[Record]:
    """Plant records that know their start; losses of rows stand for a head that is not new."""
    draw = np.random.default_rng(len(name))
    scores = (draw.random(ROWS) < accuracy).astype(float).tolist()
    start: Mapping[str, float] = {
        "start_logits": share,
        "start_features": share / 2,
        "start_kl": share,
        "base_loss": 2.0,
        "start_loss": 2.0 - float(np.mean(gains)),
        "start_equal": float(share == 0),
        "head_parameters": 0.0,
        **more,
    }
    return [
        replace(
            r,
            numbers={**r.numbers, **start},
            items={**r.items, "start": gains},
            series={"loss": [2.0, 1.5, 1.0], "gradient_A": [0.0, 1.0, 1.0], "gradient_B": [1.0, 1.0, 1.0]},
        )
        for r in planted(name, scores)
    ]


def test_damage_that_is_there_is_claimed() -> None:
    lost = (-0.5 - 0.1 * np.random.default_rng(0).random(ROWS)).tolist()
    records = [
        *started("B = 0", 0.0, [0.0] * ROWS, 0.9),
        *started("B Kaiming", 0.8, lost, 0.55),
        *started("PiSSA", 1e-7, [0.0] * ROWS, 0.9),
    ]
    answer = init.conclude(records, SETUP)
    damage, *finals = [finding for finding in answer.findings if finding.holds]
    assert damage.sentence.values["a"].values == {"start": "B Kaiming"}
    assert (damage.verdict, damage.sentence.values["b"]) == ("worse", "base")
    assert damage.effect == pytest.approx(-0.55, abs=0.01)
    assert ("worse", "B Kaiming", "B = 0") in [
        (f.verdict, f.sentence.values["a"], f.sentence.values["b"]) for f in finals
    ]
    assert keys_in(answer.sentence)[1:5] == ["init.logits", "init.equal", "init.logits", "init.off"]
    assert message_in(answer.sentence, "init.off").values["logits"] == pytest.approx(0.8)
    assert "init.end_worse" in keys_in(answer.sentence)
    assert answer.advice == {"init": "kaiming"}
    assert "init.why_worse" in keys_in(answer.blanks[3][1])
    kept = message_in(answer.blanks[4][1], "init.keep").values
    assert kept == {"keep": ["B = 0", "PiSSA"], "lose": ["B Kaiming"]}
    assert "init.pissa" in keys_in(answer.blanks[4][1])
    zero = message_in(answer.blanks[2][1], "init.first_steps").values
    assert (zero["count"], zero["loss"]) == (3, pytest.approx(1.5))
    assert zero["gradients"].values == {"a": 0.0, "b": 1.0}
    row = answer.tables[0].rows[1]
    assert (row["start_logits"], row["first_loss"], row["gradient_B"]) == (pytest.approx(0.8), 2.0, 1.0)
    assert_it_renders(answer, "init")


def test_a_start_that_moves_no_loss_is_equivalent_to_the_base() -> None:
    same = (1e-4 * np.random.default_rng(0).standard_normal(ROWS)).tolist()
    answer = init.conclude([*started("B = 0", 0.0, [0.0] * ROWS, 0.9), *started("A Gaussian", 0.1, same, 0.9)], SETUP)
    assert [f.verdict for f in answer.findings if f.sentence.values["b"] == "base"] == ["equivalent"]


def test_a_start_that_ends_better_is_not_talked_down() -> None:
    records = [*started("B = 0", 0.0, [0.0] * ROWS, 0.55), *started("B Kaiming", 0.8, [0.0] * ROWS, 0.95)]
    answer = init.conclude(records, SETUP)
    assert "init.end_better" in keys_in(answer.sentence)
    assert "init.why_better" in keys_in(answer.blanks[3][1])
    assert answer.advice == {"init": "b_kaiming"}


def test_what_was_not_measured_is_not_said() -> None:
    empty = init.conclude([], SETUP)
    assert [empty.sentence.key, *(text.key for _, text in empty.blanks)] == ["answer.nothing"] * 6
    only = init.conclude(started("PiSSA", 1e-7, [0.0] * ROWS, 0.9), SETUP)
    assert only.sentence.key == "init.neither"
    assert [value.key for _, value in only.blanks[:4]] == ["answer.not_measured"] * 4
    assert only.advice == {}
    lost = [
        replace(r, status="diverged", items={"start": r.items["start"]}, series={"loss": []})
        for r in started("B Kaiming", 0.8, [-0.5] * ROWS, 0.5)
    ]
    answer = init.conclude([*started("B = 0", 0.0, [0.0] * ROWS, 0.9), *lost], SETUP)
    assert "init.kaiming_diverged" in keys_in(answer.blanks[3][1])
    assert "init.no_gradients" in keys_in(answer.blanks[2][1])
    assert "init.diverged" in keys_in(answer.blanks[1][1])
    assert_it_renders(answer, "init")
    alone = init.conclude(lost, SETUP)
    assert alone.ranking is None
    assert_it_renders(alone, "init")
