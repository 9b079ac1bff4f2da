"""LoRA against the others: equal budgets, the source's table, latencies, told from noise."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.budgets import trained_parameters
from loralab.studies.evidence import unfinished
from loralab.studies.measures import passes
from loralab.studies.message import Message
from loralab.studies.prepare import prepare
from loralab.studies.questions import methods
from loralab.studies.questions.methods import LATENCY, TRADEOFF
from loralab.studies.readings.published import holds_here
from loralab.studies.statistics import median_interval
from loralab.studies.study import Answer, Arm, Record, StudySetup
from loralab.studies.timing import LEAST, change, overhead
from loralab.studies.wording import say

SETUP = StudySetup(study="methods", model="m", data="d")
QUICK = StudySetup(study="methods", model="m", data="d", quick=True)
GOOD, POOR = [1] * 90 + [0] * 10, [1, 0] * 50
SHAPES = ((1, 128), (8, 512))


def base(model: Any, kind: str = "causal-lm") -> Base:
    return Base(name="tiny", model=model, tokenizer=None, kind=kind, source="")


def arm(name: str, scores: list[int], budget: str | None = "r=8", **fields: object) -> list[Record]:
    options = {} if budget is None else {"budget": budget}
    own = Arm(name=name, fields={"method": name.partition(" ")[0], **fields}, options=options)
    return [Record(**{**vars(r), "arm": own}) for r in planted(name, scores)]


def timed(ways: dict[tuple[str, str], tuple[float, float]], noise: float = 0.001) -> Record:
    """Return a record of passes that take so many times a base of 10 and 200 ms."""
    draw = random.Random(0)
    rows = [
        {
            "variant": name,
            "state": state,
            "batch": batch,
            "length": length,
            "seconds": [scale * factor * (1 + draw.gauss(0, noise)) for _ in range(12)],
        }
        for (name, state), factors in {("base", "base"): (1.0, 1.0), **ways}.items()
        for factor, scale, (batch, length) in zip(factors, (0.01, 0.2), SHAPES, strict=True)
    ]
    return Record(arm=Arm(name=LATENCY), seed=0, tables={"passes": rows, "refused": []})


WAYS = {
    ("lora r=8", "merged"): (1.0, 1.0),
    ("lora r=8", "unmerged"): (1.3, 1.05),
    ("houlsby w=4", "unmerged"): (1.25, 1.03),
    ("pfeiffer w=8", "unmerged"): (1.15, 1.02),
    ("prefix p=9", "unmerged"): (1.1, 1.1),
}
TRAINED = [
    *planted("base", POOR, seeds=1),
    *arm("lora r=8", GOOD, None, rank=8),
    *arm("houlsby w=4", GOOD),
    *arm("prefix p=9", POOR),
    *arm("prefix p=2", GOOD, "r=2"),
]


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert], ids=["llama", "bert"])
def test_sizes_are_solved_for_at_both_budgets(make: tiny.Make) -> None:
    model = base(make())
    found = {a.name: a for a in methods.arms(SETUP, model)}
    budgets = {f"r={r}": trained_parameters(model, {"method": "lora", "rank": r}) for r in (8, 2)}
    seen = set()
    for own in found.values():
        if "budget" not in own.options or own.fields["method"] == "prefix-mlp":
            continue
        size = methods.SIZES[own.fields["method"]]
        here = trained_parameters(model, own.fields)
        near = [trained_parameters(model, {**own.fields, size: max(1, own.fields[size] + step)}) for step in (-1, 1)]
        budget = budgets[own.options["budget"]]
        assert abs(here - budget) <= min(abs(n - budget) for n in near)
        seen.add((own.fields["method"], own.options["budget"]))
    assert seen == set(methods.LONG)
    assert ("bitfit" in found) == (make is tiny.bert)  # Llama has no biases
    assert {"full", "ia3", LATENCY, "base"} <= found.keys()


def test_the_reference_arm_is_shared_and_quick_is_five() -> None:
    found = {a.name: a for a in methods.arms(QUICK, base(tiny.llama()))}
    assert found["lora r=8"].fields == {"method": "lora", "rank": 8}
    assert found["lora r=8"].options == {}
    assert len([a for a in found.values() if a.tuned]) == 5
    assert set(found[TRADEOFF].options["arms"]) == {"lora r=8", "full"}
    assert len(found[LATENCY].options["variants"]) == 5


def test_values_choose_methods() -> None:
    chosen = StudySetup(study="methods", model="m", data="d", values=("ia3",))
    tuned = [a.name for a in methods.arms(chosen, base(tiny.llama())) if a.tuned]
    assert tuned == ["lora r=8", "ia3"]
    assert TRADEOFF not in {a.name for a in methods.arms(chosen, base(tiny.llama()))}  # it needs full fine-tuning
    wrong = StudySetup(study="methods", model="m", data="d", values=("prefx",))
    with pytest.raises(ConfigError, match="prefix") as raised:
        methods.arms(wrong, base(tiny.llama()))
    assert (raised.value.code, raised.value.field) == ("invalid_choice", "values")


def test_full_fine_tuning_that_does_not_fit_is_named(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(methods, "SECONDS", (0, 0))
    setup = setup_of("methods", tiny_bert_folder, noise_file, seeds=1, quick=True, values=("full",))
    records = here(setup, tmp_path)
    assert TRADEOFF not in {r.arm.name for r in records}
    assert [(r.arm.name, r.status) for r in records if r.reason] == [("full", "failed")]
    answer = methods.conclude(records, setup)
    assert [name for name, _ in unfinished(records)] == ["full"]
    assert_it_renders(answer, "methods")


def test_a_method_that_was_asked_for_and_cannot_be_is_told(tiny_llama_folder: Path, sums_file: Path) -> None:
    setup = setup_of("methods", tiny_llama_folder, sums_file, quick=True, values=("bitfit", "ia3"))
    _, invalid, _ = prepare(setup, None)
    assert set(invalid) == {"bitfit"}  # Llama has no biases


def test_a_method_that_the_model_cannot_have_is_told(
    tiny_llama_folder: Path, sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.adapters import prefix
    from loralab.errors import TargetError

    def none(model: object) -> list[str]:
        raise TargetError("no attention with a cache")

    monkeypatch.setattr(prefix, "attention_names", none)
    setup = setup_of("methods", tiny_llama_folder, sums_file, quick=True)
    arms, invalid, _ = prepare(setup, None)
    assert set(invalid) == {"prefix (r=8)", "prefix (r=2)"}
    assert "no attention" in invalid["prefix (r=8)"]
    assert "lora r=8" in {a.name for a in arms}


@pytest.mark.parametrize("count", [6, 7, 12, 20, 31])
def test_the_interval_of_a_median_covers_it(count: int) -> None:
    draw, inside = np.random.default_rng(count), 0
    for _ in range(2000):
        low, high = median_interval(draw.exponential(size=count).tolist())
        inside += low <= math.log(2) <= high
    assert inside / 2000 > 0.94


def test_too_few_trials_have_no_interval() -> None:
    assert change(overhead([2.0, 2.0], [1.0, 1.0])).key == "overhead.alone"
    assert all(math.isnan(edge) for edge in median_interval([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert not overhead([2.0, 2.0], [1.0, 1.0]).holds
    assert 1 - 2 * stats.binom.cdf(0, LEAST, 0.5) >= 0.95


def test_an_overhead_is_that_of_its_own_trial() -> None:
    drift = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 7.0]  # of the machine
    own = overhead([1.2 * d for d in drift], drift)
    assert own.estimate == pytest.approx(-0.2)
    assert own.low == pytest.approx(-0.2)
    assert own.holds


def test_the_source_s_table_is_filled() -> None:
    answer = methods.conclude([*TRAINED, timed(WAYS)], SETUP)
    assert [label for label, _ in answer.blanks] == [*methods.SOURCE, methods.CHOICE]
    columns = [column.name for column in answer.tables[0].columns]
    assert columns == ["method", "adapter_parameters", "latency", "step_seconds", "score"]
    assert answer.blanks[2][1].values["arm"] == "prefix p=2"  # the better of two lengths
    merged = message_in(answer.blanks[0][1], "methods.time_merged").values["time"].values
    assert merged["seconds"] == pytest.approx(0.01, rel=0.01)
    assert message_in(answer.sentence, "methods.adds_equivalent").values["way"].values["variant"] == "lora r=8"
    assert message_in(answer.sentence, "methods.adds_equivalent").values["way"].key == "methods.merged"
    choice = answer.blanks[3][1]
    assert {"methods.by_score", "methods.by_latency", "methods.speed_alike", "ranking.take"} <= set(keys_in(choice))
    merging = message_in(choice, "methods.merging").values
    assert merging["able"] == ["lora r=8"]
    assert merging["others"] == ["houlsby w=4", "pfeiffer w=8", "prefix p=9"]
    assert answer.advice == {"method": "lora", "rank": 8}
    assert len(answer.figures) == 2
    papers = [
        message_in(row["paper"], "methods.paper").values["small"] for row in answer.tables[1].rows if row["paper"]
    ]
    assert papers == [0.303, 0.207]
    heavy = next(f for f in answer.findings if f.sentence.values.get("way") == "houlsby w=4")
    assert (heavy.verdict, heavy.holds) == ("worse", True)
    assert heavy.effect == pytest.approx(-0.25, abs=0.01)
    assert heavy.sentence.values["low"] < 0.25 < heavy.sentence.values["high"]
    assert_it_renders(answer, "methods")


PASSES = [
    "methods.merged_is_free",
    "methods.unmerged_costs",
    "methods.light_adapter_costs",
    "methods.heavy_adapter_costs_more",
    "methods.share_shrinks",
]


FORGETTING = ["methods.learns_less", "methods.forgets_less", "methods.forgets_less_at_loss"]


def published(answer: Answer) -> list[tuple[str, str]]:
    table = next(table for table in answer.tables if table.columns[0].name == "claim")
    return [(row["claim"].key, row["here"].key) for row in table.rows]


def test_published_orders_that_hold_are_said_to_hold() -> None:
    answer = methods.conclude([*TRAINED, timed(WAYS)], SETUP)
    assert published(answer) == [
        *[(name, "claim.holds") for name in PASSES],
        ("methods.all_learn", "claim.fails"),  # prefix p=9 answers as the base does
        ("methods.lora_no_worse", "claim.holds"),
        ("methods.lora_no_worse", "claim.holds"),
        *[(name, "answer.not_measured") for name in FORGETTING],
    ]
    rivals = [row["claim"].values.get("rival") for row in answer.tables[2].rows]
    assert rivals[-5:-3] == ["houlsby w=4", "prefix p=9"]
    learn = next(row["numbers"].values for row in answer.tables[2].rows if row["claim"].key == "methods.all_learn")
    assert (learn["better"], learn["all"]) == (3, 4)


def test_published_orders_that_do_not_hold_are_said_not_to() -> None:
    ways = {**WAYS, ("lora r=8", "merged"): (1.1, 1.0), ("houlsby w=4", "unmerged"): (1.05, 1.2)}
    better = arm("lora r=8", POOR, None, rank=8)
    answer = methods.conclude([*better, *arm("houlsby w=4", GOOD), timed(ways)], SETUP)
    no, yes = "claim.fails", "claim.holds"
    assert [here for _, here in published(answer)][:-3] == [no, yes, yes, no, no, no]


def other_rows(records: list[Record], forgotten: float, sure: float = 0.01) -> list[Record]:
    """Plant the losses of other texts after training."""
    draw = random.Random(forgotten)
    texts = {"general": "other text", "general_kind": "loss"}
    rows = [[-3 - n / 40 - forgotten - draw.gauss(0, sure) for n in range(40)] for _ in records]
    return [
        replace(r, items={**r.items, "general": own}, texts={**r.texts, **texts})
        for r, own in zip(records, rows, strict=True)
    ]


@pytest.mark.parametrize(
    ("lora", "full", "here"), [(0.1, 0.8, "claim.holds"), (0.8, 0.1, "claim.fails"), (0.5, 0.5, "claim.fails")]
)
def test_forgetting_less_is_claimed_where_it_was_planted(lora: float, full: float, here: str) -> None:
    runs = [
        *planted("base", POOR, seeds=1),
        *other_rows(arm("lora r=8", GOOD, None, rank=8), lora),
        *other_rows(arm("full", [1] * 100, None), full),
    ]
    answer = methods.conclude(runs, SETUP)
    assert dict(published(answer))["methods.forgets_less"] == here
    assert dict(published(answer))["methods.learns_less"] == "claim.holds"
    assert dict(published(answer))["methods.forgets_less_at_loss"] == "answer.not_measured"
    told = [f for f in answer.findings if "methods.elsewhere" in keys_in(f.sentence)]
    assert len(told) == 1 and told[0].effect == pytest.approx(full - lora, abs=0.02)
    assert "methods.by_forgetting" in keys_in(answer.blanks[3])
    assert "  " not in say(told[0].sentence, "zh-TW")
    assert_it_renders(answer, "methods")


def test_noisy_times_prove_no_sameness() -> None:
    answer = methods.conclude([*TRAINED, timed(dict.fromkeys(WAYS, (1.0, 1.0)), 0.3)], SETUP)
    assert published(answer)[:5] == [(name, "claim.undecided") for name in PASSES]
    assert_it_renders(answer, "methods")


@pytest.mark.parametrize(
    ("verdicts", "key"),
    [
        ([], "answer.not_measured"),
        (["worse", "worse"], "claim.holds"),
        (["worse", "undecided"], "claim.undecided"),
        (["worse", "undecided", "equivalent"], "claim.fails"),
        (["better"], "claim.fails"),
    ],
)
def test_a_claim_holds_where_every_verdict_is_the_expected_one(verdicts: list[str], key: str) -> None:
    assert holds_here(verdicts, {"worse"}).key == key


def names_in(sentence: Message) -> list[object]:
    """Return the arm, or arms, that a finding speaks of."""
    way = sentence.values.get("way")
    named = way.values.get("variant") if isinstance(way, Message) else way
    return [named, sentence.values.get("a"), sentence.values.get("b")]


def test_noise_is_claimed_by_nobody() -> None:
    ways = dict.fromkeys(WAYS, (1.0, 1.0))
    same = [*arm("lora r=8", GOOD, None, rank=8), *arm("houlsby w=4", GOOD)]
    answer = methods.conclude([*planted("base", GOOD, seeds=1), *same, timed(ways, 0.05)], SETUP)
    assert not any(f.holds for f in answer.findings if "lora r=8" in names_in(f.sentence))
    assert answer.advice == {}


def test_nothing_measured_and_nothing_timed_are_said() -> None:
    empty = methods.conclude([], SETUP)
    assert [text.key for _, text in empty.blanks] == ["answer.nothing"] * 4
    assert empty.sentence.key == "answer.nothing"
    alone = methods.conclude([timed(WAYS)], SETUP)
    assert len(alone.tables) == 1
    assert len(alone.findings) == len(WAYS)
    untimed = methods.conclude(TRAINED, SETUP)
    assert untimed.blanks[0][1].values["latency"].key == "answer.not_measured"
    assert published(untimed)[-3:] == [(name, "answer.not_measured") for name in FORGETTING]
    assert published(untimed)[:5] == [(name, "answer.not_measured") for name in PASSES]
    assert_it_renders(untimed, "methods")
    one = methods.conclude(arm("lora r=8", GOOD, None, rank=8)[:1], QUICK)
    assert one.blanks[1][1].key == "answer.not_measured"


def test_passes_are_those_of_the_variants() -> None:
    """Compute in each way what the way says, and leave the model itself as it is."""
    model = base(tiny.llama())
    plain, before = tiny.logits(model.model), dict(model.model.named_parameters())
    variants: dict[str, Any] = {"lora": {"method": "lora", "rank": 2}, "p": {"method": "prefix"}}
    models, refused = passes.models_of(model, {**variants, "b": {"method": "bitfit"}})
    assert list(models) == [("base", "base"), ("lora", "merged"), ("lora", "unmerged"), ("p", "unmerged")]
    assert [row["variant"] for row in refused] == ["b"]
    assert not torch.equal(tiny.logits(models["p", "unmerged"]), plain)
    merged = models["lora", "merged"]
    assert not any("LoRA" in type(m).__name__ for m in merged.modules())  # a merged model is a plain one
    own = dict(merged.named_parameters())
    assert sum(own[name] is not weight for name, weight in before.items()) == 3 * 7
    assert any("LoRA" in type(m).__name__ for m in models["lora", "unmerged"].modules())
    after = dict(model.model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is weight for name, weight in before.items())
    assert torch.equal(tiny.logits(model.model), plain)


def test_a_merged_head_is_not_the_base_s() -> None:
    model = base(tiny.bert(), "sequence-classification")
    plain, head = tiny.logits(model.model), model.model.classifier
    models, _ = passes.models_of(model, {"lora": {"method": "lora"}})
    assert models["lora", "merged"].classifier is not head
    assert model.model.classifier is head
    assert torch.equal(tiny.logits(model.model), plain)


def test_trials_take_turns_and_end() -> None:
    model = base(tiny.llama())
    variants: dict[str, Any] = {"lora": {"method": "lora", "rank": 2}}
    models, _ = passes.models_of(model, variants)
    times = passes.interleaved(model, models, [(1, 8), (2, 8)], seconds=0.0, most=9)
    assert {len(own) for own in times.values()} == {LEAST}
    assert {shape for _, shape in times} == {(1, 8)}  # there was no time for the larger one
    more = passes.interleaved(model, models, [(1, 8), (2, 8)], seconds=1e9, most=7)
    assert {len(own) for own in more.values()} == {7}
    assert all(t > 0 for own in more.values() for t in own)


def test_shapes_leave_room_for_a_prefix() -> None:
    model = base(tiny.bert(), "sequence-classification")
    room = model.model.config.max_position_embeddings
    assert passes.shapes_of(model, 20) == [(1, 128), (4, 256), (8, room - 20)]


def test_the_whole_study_on_a_tiny_encoder(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "SECONDS", (0, 0))
    setup = setup_of("methods", tiny_bert_folder, noise_file, seeds=1, quick=True)
    records = here(setup, tmp_path)
    assert {r.arm.name for r in records if r.reason} == set()
    answer = methods.conclude(records, setup)
    assert_it_renders(answer, "methods")
    *known, last = (row["method"] for row in answer.tables[0].rows)
    assert last == "full"  # which the source's table has not
    rows = [label.values["family"] for label in known]
    order = [methods.SOURCE.index(family) for family in rows]
    assert all(a <= b for a, b in pairwise(order))
