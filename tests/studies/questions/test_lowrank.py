"""The low-rank study sees a planted low rank, d90 and shared directions, and no others."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of
from torch import nn

from loralab.adapters.spectrum import overlap
from loralab.errors import ConfigError
from loralab.studies import verdicts
from loralab.studies.evidence import parameters
from loralab.studies.measures import dimension as measured_dimension
from loralab.studies.measures import frozen, overlaps, spectra
from loralab.studies.message import Message
from loralab.studies.questions import lowrank
from loralab.studies.readings import dimension
from loralab.studies.readings.intruders import intruders
from loralab.studies.readings.low_rank import Part
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, Trial
from loralab.studies.trained import measured
from loralab.studies.wording import LANGUAGES, say
from loralab.training.preflight import load_base

SETUP = StudySetup(study="lowrank", model="m", data="d")
ROWS = 300


def rows_at(share: float, name: str) -> list[float]:
    """Return right and wrong rows with this share of right ones."""
    draw = random.Random(name)
    rows = [float(n < share * ROWS) for n in range(ROWS)]
    draw.shuffle(rows)
    return rows


def full(matrices: Mapping[str, torch.Tensor], score: float = 0.8) -> list[Record]:
    """Plant records of a full fine-tune whose layers moved by these matrices."""
    tables = []
    for name, change in matrices.items():
        draw = torch.randn(*change.shape, generator=torch.Generator().manual_seed(1))
        random_ = spectra.of_values(spectra.values_of(draw))
        tables.append(
            {
                "name": name,
                "layer": 0,
                "module": name,
                "shape": list(change.shape),
                "most": min(change.shape),
                "relative": 0.01,
                **spectra.of_values(spectra.values_of(change)),
                **{f"random_{k}": v for k, v in random_.items()},
            }
        )
    (record,) = planted("full", rows_at(score, "full"), seeds=1)
    return [Record(**{**vars(record), "tables": {"modules": tables}})]


def floor(score: float = 0.5) -> Record:
    items = rows_at(score, "base")
    return Record(
        arm=Arm(name="base"),
        seed=0,
        numbers={"score": score},
        texts={"metric": "accuracy"},
        items={"score": items, "majority": items},
    )


def curve(scores: Mapping[int, float], variant: str = "did") -> list[Record]:
    return [
        Record(
            arm=Arm(name=f"{variant} {d}", options={"variant": variant, "d": d}),
            seed=0,
            numbers={"score": y, "large": 1_000_000},
            items={"score": rows_at(y, str(d))},
            texts={"metric": "accuracy"},
        )
        for d, y in scores.items()
    ]


def pair_record(draw: torch.Generator, shared: float) -> Record:
    """Plant overlaps of updates that share their strongest input direction, or do not."""
    pairs: dict[str, dict[str, Any]] = {"small": {}, "large": {}, "again": {}}
    for number in range(12):
        common = torch.randn(64, generator=draw)
        for name, rank in (("small", 8), ("large", 16), ("again", 16)):
            A, B = torch.randn(rank, 64, generator=draw), torch.randn(48, rank, generator=draw)
            A[0] += shared * common
            pairs[name][f"m{number}"] = A, B
    weight = torch.randn(48, 64, generator=draw)
    amplification = [
        {"rank": rank, "name": m, **overlaps.amplified(*pairs[name][m], 1.0, weight)}
        for name, rank in (("small", 8), ("large", 64))
        for m in pairs[name]
    ]
    phi, modules = overlaps.overlaps(pairs)
    tables = {"phi": phi, "modules": modules, "amplification": amplification}
    return Record(arm=Arm(name=lowrank.PAIRS), seed=0, tables=tables)


def test_a_low_rank_update_is_called_one_and_noise_is_not() -> None:
    draw = torch.Generator().manual_seed(0)

    def low(k: int) -> torch.Tensor:
        return torch.randn(40, k, generator=draw) @ torch.randn(k, 40, generator=draw)

    few = {f"m{n}": low(3) for n in range(8)}
    answer = lowrank.conclude(full(few), SETUP)
    facts = message_in(answer.sentence, "lowrank.spectrum_low").values["facts"].values
    assert facts["most"] == 40
    assert facts["rank90"] <= 3 < facts["random_rank90"]
    assert answer.findings[0].verdict == "better"
    assert_it_renders(answer, "lowrank")
    noise = {f"m{n}": torch.randn(40, 40, generator=draw) for n in range(8)}
    answer = lowrank.conclude(full(noise), SETUP)
    assert not {"lowrank.spectrum_low", "lowrank.spectrum_some"} & set(keys_in(answer.sentence))
    assert answer.findings[0].verdict in ("equivalent", "undecided")
    halves = {f"m{n}": low(24) for n in range(8)}
    assert "lowrank.spectrum_some" in keys_in(lowrank.conclude(full(halves), SETUP).sentence)


def test_d90_is_where_it_was_planted() -> None:
    scores = {10: 0.5, 100: 0.6, 1000: 0.79, 10_000: 0.8}
    answer = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve(scores)], SETUP)
    found = message_in(answer.sentence, "lowrank.d90_found").values
    assert (found["variant"], found["d90"], found["large"], found["share"]) == ("DID", 1000, 1_000_000, 0.001)
    assert [d.values["d"] for d in found["tried"]] == [10, 100, 1000, 10_000]
    assert_it_renders(answer, "lowrank")
    never = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.6})], SETUP)
    assert message_in(never.sentence, "lowrank.d90_beyond").values["largest"] == 100
    first = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve({10: 0.8})], SETUP)
    assert not any(f.holds for f in first.findings if f.sentence.key == "lowrank.d90_not_below")
    flat = [floor(0.5), *full({"m": torch.eye(4)}, score=0.5), *curve(scores)]
    assert "lowrank.no_gain" in keys_in(lowrank.conclude(flat, SETUP).sentence)


@pytest.mark.parametrize(
    ("kind", "value", "low", "high"),
    [
        ("found", 100, 10, 1000),
        ("found", 100, 100, math.inf),
        ("found", 1000, 100, math.inf),
        ("at_most", 10, 10, 100),
        ("not_below", 1000, 1000, math.inf),
        ("not_below", math.inf, 1000, math.inf),
        ("open", math.inf, 100, math.inf),
        ("beyond", math.inf, math.inf, math.inf),
    ],
)
def test_an_interval_that_says_nothing_is_not_said_as_one(kind: str, value: float, low: float, high: float) -> None:
    finding = dimension.reached("DID", (10, 100, 1000), value, (low, high), 5000)
    assert finding.sentence.key == f"lowrank.d90_{kind}"
    assert finding.holds == math.isfinite(high)
    assert (finding.effect is None) == (kind not in ("found", "at_most"))
    for language in LANGUAGES:
        assert say(finding.sentence, language)


def test_a_dip_does_not_hide_d90_and_the_interval_holds_it() -> None:
    full_, low = (np.asarray(rows_at(y, f"{y}")) for y in (0.8, 0.5))
    heights = {1: 0.5, 10: 0.9, 100: 0.86, 1000: 0.95}
    found = {d: np.asarray(rows_at(y, str(d))) for d, y in heights.items()}
    assert dimension.target(full_, low) == pytest.approx(0.77)
    value = dimension.smallest(found, full_, low)
    first, last = dimension.interval(found, full_, low)
    assert first <= value == 10 <= last < math.inf


def test_shared_directions_are_seen_and_random_ones_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    answer = lowrank.conclude([pair_record(draw, 3.0)], SETUP)
    shared = [f for f in sides(answer) if "lowrank.input" in keys_in(f.sentence)]
    assert len(shared) == 2
    assert all(f.verdict == "better" and f.effect and f.effect > 0.2 for f in shared)
    assert "lowrank.first_directions" in keys_in(answer.sentence)
    assert_it_renders(answer, "lowrank")
    answer = lowrank.conclude([pair_record(draw, 0.0)], SETUP)
    assert len(sides(answer)) == 4
    assert all(f.verdict in ("equivalent", "undecided") for f in sides(answer))
    assert "lowrank.none_shared" in keys_in(answer.sentence)
    inside = [f for f in answer.findings if "lowrank.inside_b" in keys_in(f.sentence)]
    assert len(inside) == 2
    assert all(f.verdict != "better" for f in inside)  # W knows nothing of these updates


def sides(answer: Answer) -> list[Finding]:
    """Return the findings on first directions."""
    return [f for f in answer.findings if "lowrank.first_directions" in keys_in(f.sentence)]


def test_phi_is_the_overlap_of_every_pair_of_first_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(30, k, generator=draw))[0] for k in (4, 9))
    table = overlaps.phi(left, right)
    for i, j in ((1, 1), (2, 9), (4, 3), (4, 9)):
        assert float(table[i - 1, j - 1]) == pytest.approx(overlap(left[:, :i], right[:, :j]), abs=1e-6)
    chance = [float(overlaps.phi(*(torch.linalg.qr(torch.randn(30, k))[0] for k in (2, 6)))[1, 5]) for _ in range(300)]
    assert sum(chance) / len(chance) == pytest.approx(6 / 30, abs=0.02)


def test_amplification_is_that_of_the_paper() -> None:
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    A, B = torch.eye(4)[2:3], 6 * torch.eye(4)[:, 2:3]  # the third direction, length 6
    found = overlaps.amplified(A, B, 0.5, weight)
    assert found["update"] == pytest.approx(3) and found["inside"] == pytest.approx(3)
    assert found["factor"] == pytest.approx(1) and found["own"] == pytest.approx(5)
    assert found["chance"] == pytest.approx(float(weight.norm()) / 4)


def test_singular_values_are_those_of_the_svd() -> None:
    for shape in ((5, 9), (9, 5)):
        matrix = torch.randn(*shape)
        torch.testing.assert_close(
            spectra.values_of(matrix).float(), torch.linalg.svdvals(matrix), atol=1e-4, rtol=1e-4
        )


def test_nothing_measured_is_said_and_every_blank_has_its_label() -> None:
    answer = lowrank.conclude([], SETUP)
    assert answer.sentence.key == "answer.nothing"
    assert [label.key for label, _ in answer.blanks] == [
        "lowrank.known_label",
        "lowrank.changed_label",
        "lowrank.meaning_label",
    ]
    alone = lowrank.conclude(planted("linear head", [1.0, 0.0, 1.0]), SETUP)
    assert alone.sentence.key == "lowrank.neither"
    for found in (answer, alone):
        assert_it_renders(found, "lowrank")


@pytest.mark.parametrize("seeds", [1, 2])
def test_it_runs_on_a_tiny_model(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path, seeds: int
) -> None:
    values = ("10", "60")
    setup = setup_of("lowrank", tiny_bert_folder, noise_file, values=values, seeds=seeds, quick=seeds == 1)
    records = here(setup, tmp_path)
    assert {r.status for r in records} <= {"done", "diverged"}
    answer = lowrank.conclude(records, setup)
    assert_it_renders(answer, "lowrank")
    (modules,) = {len(r.tables["modules"]) for r in records if r.arm.name == "full"}
    assert modules == 6 + 1
    assert answer.figures and answer.tables
    assert sum("phi" in f.name for f in answer.figures) == 4


def test_what_decides_is_what_every_arm_is_scored_by(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("lowrank", tiny_bert_folder, noise_file, seeds=1, metric="loss")
    arms = {
        "base": Arm(name="base", options={"measure": measured_dimension.MEASURE_FLOOR}),
        "did": Arm(name="did", options={"measure": measured_dimension.MEASURE_DIMENSION, "variant": "did", "d": 10}),
        "head": Arm(name="head", options={"measure": frozen.MEASURE_FROZEN}),
    }
    found = {}
    for name, arm in arms.items():
        own = replace(arm, options={**arm.options, "rates": [1.0]})
        trial = Trial(measure=own.options["measure"], setup=setup, arm=own, seed=0)
        found[name] = measured(trial, tmp_path / name, lambda event: None)
    for name in ("base", "did"):
        assert found[name].texts["metric"] == "loss"
        assert max(found[name].items["score"]) < 0
        assert "majority" not in found[name].items
    assert (found["head"].status, found["head"].items) == ("failed", {})


def test_a_linear_head_trains_nothing_beside_the_head(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("lowrank", tiny_bert_folder, noise_file, seeds=1)
    head = Trial(measure=frozen.MEASURE_FROZEN, setup=setup, arm=Arm(name=lowrank.HEAD), seed=0)
    record = measured(head, tmp_path, lambda event: None)
    assert record.numbers["parameters"] > 0
    assert parameters([record]) == 0


def test_the_values_are_numbers_of_directions(tiny_bert_folder: Path, noise_file: Path) -> None:
    from loralab.studies.trained import rows_of

    setup = setup_of("lowrank", tiny_bert_folder, noise_file, values=("1000", "30", "1000"))
    base = load_base(str(tiny_bert_folder), rows_of(setup), "fp32", 0)
    names = [arm.name for arm in lowrank.arms(setup, base)]
    assert names[-4:] == ["DID d=30", "DID d=1000", "SAID d=30", "SAID d=1000"]
    wrong = setup_of("lowrank", tiny_bert_folder, noise_file, values=("many",))
    with pytest.raises(ConfigError) as caught:
        lowrank.arms(wrong, base)
    assert (caught.value.code, caught.value.field) == ("wrong_value", "values")


def test_a_fitted_head_is_at_the_optimum_and_finds_what_the_features_hold() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64, generator=draw)
    y = (x[:, 0] + 0.1 * x[:, 1] > 0).long()
    head = frozen.fitted(x, y, 2, 1e-2).requires_grad_()
    loss = nn.functional.cross_entropy(frozen.logits(head, x), y)
    (loss + 1e-2 * head[:, :-1].square().sum()).backward()
    assert head.grad is not None and head.grad.abs().max() < 1e-4
    assert (frozen.logits(head, x).argmax(dim=1) == y).double().mean() > 0.95


def test_features_are_those_the_head_reads(tiny_bert_folder: Path, noise_file: Path) -> None:
    from loralab.studies.trained import rows_of
    from loralab.tasks.score import evaluate

    task = rows_of(setup_of("lowrank", tiny_bert_folder, noise_file))
    base = load_base(str(tiny_bert_folder), task, "fp32", 0)
    base.model.eval()
    x, y = frozen.features(base, task, "test", 64)
    classifier = base.model.classifier
    own = (classifier(x.float()).argmax(dim=1) == y).double().mean()
    scores = evaluate(base.model, base.tokenizer, task, "test", kind=base.kind)
    assert float(own) == pytest.approx(scores.metrics["accuracy"])


def test_what_comes_next_follows_from_d90() -> None:
    reached = [floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.8, 1000: 0.95})]
    assert lowrank.conclude(reached, SETUP).next == Message("lowrank.between")
    not_reached = [floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.52})]
    answer = lowrank.conclude(not_reached, SETUP)
    assert answer.next == Message("lowrank.longer")
    assert "lowrank.d90_beyond" in keys_in(answer.sentence)


def intruding(shares: Mapping[str, float], gained: float = 0.0, seeds: int = 2) -> list[Record]:
    """Plant the shares of intruders of the runs, and what repairing r=8 gives back elsewhere."""
    draw, found = random.Random(0), []
    for seed in range(seeds):
        tables: dict[str, list[dict[str, Any]]] = {}
        for run, share in shares.items():
            rank = None if run == lowrank.FULL else int(run.removeprefix("r="))
            for layer in range(12):
                own = min(1.0, max(0.0, share + draw.choice([-0.1, 0.0, 0.1])))
                row = {"name": f"m{layer}", "share": own, "nearest": 0.6, "chance": 0.14, "energy": own / 2}
                table = tables.setdefault(lowrank.FULL if rank is None else lowrank.PAIRS, [])
                table.append({**row, "relative": 0.01} | ({} if rank is None else {"rank": rank}))
        trained = [draw.gauss(-3, 0.3) for _ in range(60)]
        items = {"task": rows_at(0.8, "t"), "task repaired": rows_at(0.8, "t"), "general": trained}
        items["general repaired"] = [loss + gained + draw.gauss(0, 0.01) for loss in trained]
        texts = {"task_metric": "accuracy", "general_kind": "loss", "general": "other text"}
        pair = Record(arm=Arm(name=lowrank.PAIRS), seed=seed, items=items, texts=texts)
        for name, record in ((lowrank.FULL, Record(arm=Arm(name=lowrank.FULL), seed=seed)), (lowrank.PAIRS, pair)):
            found.append(replace(record, tables={"intruders": tables[name]}))
    return found


def verdicts_of(records: list[Record]) -> dict[str, str]:
    found = intruders(records, lowrank.FULL, lowrank.PAIRS)
    names = ("r=8", "r=64", "elsewhere", "task")
    return dict(zip(names, (f.verdict for f in found.findings), strict=True))


def test_more_intruders_than_full_fine_tuning_are_seen_and_as_many_are_not() -> None:
    more = verdicts_of(intruding({"r=8": 0.5, "r=64": 0.2, "full": 0.1}, gained=0.2))
    assert more == {"r=8": "better", "r=64": "better", "elsewhere": "better", "task": "equivalent"}
    fewer = verdicts_of(intruding({"r=8": 0.2, "r=64": 0.5, "full": 0.5}, gained=-0.2))
    assert (fewer["r=8"], fewer["elsewhere"]) == ("worse", "worse")
    assert fewer["r=64"] in ("equivalent", "undecided")
    same = verdicts_of(intruding({"r=8": 0.3, "r=64": 0.3, "full": 0.3}))
    assert "better" not in same.values() and "worse" not in same.values()
    assert same["elsewhere"] == "equivalent"


def test_intruders_stand_in_the_answer_beside_chance(tmp_path: Path) -> None:
    records = [*full({"m": torch.eye(4)}), *intruding({"r=8": 0.5, "r=64": 0.2, "full": 0.1}, gained=0.2)]
    answer = lowrank.conclude(records, SETUP)
    named = message_in(answer.findings, "lowrank.intruders_of").values
    assert (named["run"], named["top"]) == ("r=8", 10)
    assert named["count"] == pytest.approx(5, abs=0.4)
    assert "lowrank.repaired" in keys_in(answer.blanks[1])
    table = next(t for t in answer.tables if t.title.key == "lowrank.intruder_table")
    assert [row["run"] for row in table.rows] == ["r=8", "r=64", "full"]
    assert_it_renders(answer, "lowrank")
    assert intruders([], lowrank.FULL, lowrank.PAIRS) == Part()
    verdicts.write(tmp_path, {"lowrank": (SETUP, records, answer)})
    stored = json.loads((tmp_path / verdicts.FILE).read_text(encoding="utf-8"))["claims"]
    assert [(own["verdict"], own["effect"]) for own in stored] == [
        (f.verdict, pytest.approx(f.effect)) for f in answer.findings if f.verdict
    ]
    assert sum("intruder dimensions" in own["claim"] for own in stored) == 2
