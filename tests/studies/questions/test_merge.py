"""Merging: what it changes, what it leaves, and what is said of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, setup_of

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.models.quantize import QuantizedLinear, quantize
from loralab.studies.measures import drift, merging
from loralab.studies.questions import merge
from loralab.studies.questions.merge import AGAIN, AWARE, DRIFT
from loralab.studies.study import Arm, Record, StudySetup

SETUP = StudySetup(study="merge", model="m", data="d", quick=True)
RIGHT = [1.0] * 30 + [0.0] * 10


def base(model: Any) -> Base:
    return Base(name="tiny", model=model, tokenizer=None, kind="causal-lm", source="")


def record(name: str, difference: float = 1e-8, changed: int = 0, **numbers: float) -> Record:
    after = [0.0] * changed + RIGHT[changed:]
    own = {
        "loss_before": 0.6,
        "loss_after": 0.6 + difference,
        "loss_difference": difference,
        "logit_difference": 1e-5,
        "relative": 1e-6,
        "kl": 1e-9,
        "top1": 1.0,
        "positions": 64.0,
        "changed": float(changed),
        "rows": 40.0,
        "moved": 0.9,
        "noise": 1e-5,
        "effect_kl": 0.1,
        "restored": 1.0,
        "same_logits": 1.0,
        "merge_seconds": 0.3,
        "unmerge_seconds": 1e-3,
    }
    return Record(
        arm=Arm(name=name, plain=True),
        seed=0,
        numbers={**own, **numbers},
        items={merging.BEFORE: RIGHT, merging.AFTER: after},
        texts={"metric": "accuracy"},
    )


def drifted(exact: bool = True) -> Record:
    rows = [
        {
            "precision": name,
            "exact": exact,
            "changed": [0.1] * 8,
            "kl": 1e-6,
            "top1": 1.0,
            "relative": [[size * n * (1 + m / 10) for n in drift.NOTED] for m in range(8)],
        }
        for name, size in (("fp32", 1e-10), ("bf16", 1e-4))
    ]
    return Record(arm=Arm(name=DRIFT), seed=0, tables={"drift": rows}, numbers={"merges": 100, "modules": 8, "of": 8})


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert], ids=["llama", "gpt2", "bert"])
def test_putting_back_is_exact_where_subtracting_is_not(make: tiny.Make) -> None:
    adapter = tiny.fill(attach(make(), LoRA(rank=4)))
    module = next(iter(adapter.modules.values()))
    kept = module.base.weight.clone()
    own = module.lora_A.clone()
    left, found = drift.both_ways(module, torch.bfloat16)
    assert found["exact"]
    assert found["relative"][-1] > 0
    assert 0 < found["changed"] <= 1
    assert not torch.equal(left, kept.bfloat16())
    assert torch.equal(module.base.weight, kept), "the module is left as it was"
    assert torch.equal(module.lora_A, own)


def test_subtracting_is_exact_where_no_bit_is_lost() -> None:
    weight = torch.ones(4, 4, dtype=torch.float64)
    relative, now = drift.subtracted(weight, [torch.full((4, 4), 2.0**-n).double() for n in (1, 2)])
    assert relative == [0.0] * len(drift.NOTED)
    assert torch.equal(now, weight)


def test_drift_is_that_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 16, generator=draw).bfloat16()
    deltas = [(torch.randn(16, 16, generator=draw) / 9).bfloat16() for _ in range(3)]
    relative, now = drift.subtracted(weight, deltas)
    plain = weight.clone()
    for n in range(1, 101):
        plain = (plain + deltas[n % 3]) - deltas[n % 3]
    assert torch.equal(plain, now)
    off = (plain.double() - weight.double()).norm() / weight.double().norm()
    assert relative[-1] == pytest.approx(float(off))


def test_the_three_adapters_are_as_large_and_different() -> None:
    own = (torch.randn(4, 32), torch.randn(16, 4) / 7)
    three = drift.adapters_like(own)
    for A, B in three[1:]:
        assert float(B.std()) == pytest.approx(float(own[1].std()), rel=0.4)
        assert not torch.equal(A, own[0])
    assert not torch.equal(three[1][1], three[2][1])


def test_rounding_is_nothing_in_fp32_and_something_in_bf16() -> None:
    exact = merging.rounding(tiny.fill(attach(tiny.llama(), LoRA(rank=4))))
    coarse = merging.rounding(tiny.fill(attach(tiny.llama().bfloat16(), LoRA(rank=4))))
    assert exact["noise"] == 0
    assert exact["moved"] > 0.99
    assert coarse["noise"] > 1e-4


def test_digests_see_a_single_bit() -> None:
    model = tiny.llama()
    before = merging.weight_digests(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    after = merging.weight_digests(model)
    assert [n for n in before if before[n] != after[n]] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("ability", [{}, {"avx512_fp16": True}, {"amx_fp16": True}])
def test_arms_are_the_adapter_and_the_forms_of_the_base(
    ability: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ability)
    fp16 = ["fp16"] if ability else []
    names = [arm.name for arm in merge.arms(SETUP, base(tiny.llama()))]
    assert names == ["r=8", "fp32", "bf16", *fp16, "NF4", AGAIN, DRIFT]


def test_arms_can_be_chosen() -> None:
    chosen = StudySetup(study="merge", model="m", data="d", values=("fp16",))
    assert [arm.name for arm in merge.arms(chosen, base(tiny.llama()))] == ["r=8", "fp16"]
    wrong = StudySetup(study="merge", model="m", data="d", values=("fp8",))
    with pytest.raises(ConfigError) as caught:
        merge.arms(wrong, base(tiny.llama()))
    assert (caught.value.code, caught.value.field) == ("invalid_choice", "values")


def test_a_thorough_study_merges_in_every_module() -> None:
    thorough = StudySetup(study="merge", model="m", data="d", values=("drift",))
    *_, arm = merge.arms(thorough, base(tiny.llama()))
    assert arm.options["precisions"] == ["fp32", "bf16", "fp16"]
    adapter = attach(tiny.llama(), LoRA(rank=4))
    assert drift.spaced(adapter.modules, arm.options.get("modules")) == adapter.modules
    assert len(drift.spaced(adapter.modules, 7)) == 7


def test_nothing_measured_says_so() -> None:
    answer = merge.conclude([], SETUP)
    assert answer.sentence.key == "answer.nothing"
    assert [said.key for _, said in answer.blanks] == ["answer.not_measured"] * 2
    assert not answer.findings


def test_a_difference_below_the_expectation_holds() -> None:
    answer = merge.conclude([record("fp32", 3e-8), record("bf16", 2e-3, 0)], SETUP)
    assert answer.blanks[0][1].values["difference"] == 3e-8
    assert answer.blanks[0][1].values["share"] == pytest.approx(3e-8 / 0.6)
    assert answer.blanks[1][1].key == "claim.holds"
    assert keys_in(answer.sentence)[:2] == ["join.sentences", "merge.fp32_same"]
    assert message_in(answer.sentence, "merge.form").values["difference"] == 2e-3
    assert not any(f.holds for f in answer.findings)


def test_a_difference_above_the_expectation_is_reported_as_such() -> None:
    answer = merge.conclude([record("fp32", 4e-6)], SETUP)
    assert message_in(answer.sentence, "merge.fp32_above").values["difference"] == 4e-6
    assert answer.blanks[1][1].key == "merge.not_expected"
    assert answer.blanks[1][1].values["unit"] == 2.0**-24  # of fp32 at 0.6


def test_a_difference_below_the_expectation_can_change_an_answer() -> None:
    answer = merge.conclude([record("fp32", 3e-8, 1)], SETUP)
    assert message_in(answer.sentence, "merge.fp32_below")
    assert message_in(answer.sentence, "merge.answers").values["changed"] == 1


def test_a_loss_of_answers_is_claimed() -> None:
    answer = merge.conclude([record("fp32"), record("bf16", 0.3, 25)], SETUP)
    held = [f for f in answer.findings if f.holds]
    assert len(held) == 1
    assert (held[0].verdict, held[0].sentence.key) == ("worse", "contrast.worse")
    a, b = held[0].sentence.values["a"], held[0].sentence.values["b"]
    assert (a.key, b.key, a.values["arm"]) == ("merge.merged", "merge.unmerged", "bf16")


def test_drift_and_packing_are_told() -> None:
    again = record(AGAIN, 0.02, kept=0.01)
    again = Record(**{**vars(again), "series": {"kept": [0.01 + i / 1e4 for i in range(20)]}})
    answer = merge.conclude([record("fp32"), again, drifted()], SETUP)
    assert message_in(answer.sentence, "merge.way_back").values["precision"] == "bf16"
    assert message_in(answer.sentence, "merge.again").values["kept"] == pytest.approx(0.01095)
    held = [finding for finding in answer.findings if finding.holds]
    assert [f.sentence.key for f in held] == ["merge.kept", "merge.off", "merge.off"]
    assert {f.verdict for f in held} == {"worse"}
    assert held[0].sentence.values["low"] < 0.011 < held[0].sentence.values["high"]
    assert held[2].sentence.values["off"] == pytest.approx(1e-2 * 1.35)
    assert [figure.name for figure in answer.figures] == ["merge-drift", "merge-kl"]
    assert_it_renders(answer, "merge")
    assert "merge.defect" in keys_in(merge.conclude([drifted(exact=False)], SETUP).sentence)


def test_a_whole_study_trains_for_the_merge_too() -> None:
    whole = StudySetup(study="merge", model="m", data="d")
    arm = next(arm for arm in merge.arms(whole, base(tiny.llama())) if arm.name == AWARE)
    assert (arm.options["quantize"], arm.options["again"], arm.options["aware"]) == ("nf4", True, True)
    answer = merge.conclude([record("fp32"), record(AWARE, 0.02, kept=0.99, gain_kept=0.97)], whole)
    assert message_in(answer.sentence, "merge.aware").values["gain"] == pytest.approx(0.97)
    assert_it_renders(answer, "merge")


def test_along_the_grid_the_update_is_kept() -> None:
    pytest.importorskip("bitsandbytes")
    shares = {}
    for aware in (False, True):
        model = tiny.llama(1, hidden_size=64, intermediate_size=128)
        quantize(model, "nf4", "")
        adapter = attach(model, LoRA(rank=4))
        for module in adapter.modules.values():
            torch.nn.init.normal_(module.lora_B, std=2e-3)
        shares[aware] = list(merging.packed_again(adapter, aware=aware).values())
        assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in adapter.modules)
    assert sum(shares[False]) / 7 < 0.5
    assert abs(sum(shares[True]) / 7 - 1) < 0.2


def test_a_change_of_the_loss_is_claimed_and_rounding_is_not() -> None:
    def lost(name: str, by: float) -> Record:
        own, losses = record(name, by), [0.5 + i / 100 for i in range(40)]
        items = {
            "before loss": [-x for x in losses],
            "after loss": [-x - by * (1 + i / 40) for i, x in enumerate(losses)],
        }
        return Record(**{**vars(own), "items": {**own.items, **items}})

    findings = merge.conclude([lost("fp32", 1e-8), lost("NF4", 0.5)], SETUP).findings
    assert [f.holds for f in findings[:2]] == [False, True]
    assert findings[0].sentence.key == "merge.rounding"
    assert findings[1].sentence.key == "contrast.worse"
    assert findings[1].sentence.values["a"].values["arm"] == "NF4"
    assert findings[1].effect == pytest.approx(-0.74375)


def test_one_score_for_all_rows_claims_nothing() -> None:
    lone = record("fp32")
    items = {merging.BEFORE: [0.5], merging.AFTER: [0.9]}
    answer = merge.conclude([Record(**{**vars(lone), "items": items})], SETUP)
    assert not answer.findings[0].holds
    assert answer.findings[0].sentence.key == "contrast.single"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_tiny_study_runs_to_its_end(
    kind: str, here: Here, tiny_llama_folder: Path, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    folder = tiny_llama_folder if kind == "llama" else tiny_bert_folder
    setup = setup_of("merge", folder, noise_file, quick=True, seeds=1, fields={"learning_rate": 0.02})
    records = here(setup, tmp_path)
    assert {r.arm.name: r.reason for r in records if r.reason} == {}
    found = {r.arm.name: r.numbers for r in records}
    assert found["fp32"]["loss_difference"] < 1e-5
    for name in ("fp32", "bf16", "NF4"):
        assert found[name]["restored"] == found[name]["same_logits"] == 1
    assert found["fp32"]["kl"] < found["fp32"]["effect_kl"] or math.isclose(found["fp32"]["kl"], 0)
    assert len(list(tmp_path.glob("runs/*/run"))) == 1, "trained once, read by all others"
    answer = merge.conclude(records, setup)
    forms = set(merge.usual(setup)) - {"fp32", "drift"}  # fp16 where the machine multiplies in it
    assert len(answer.blanks) == 2 + len(forms)
    assert len(answer.tables) == 2
    assert_it_renders(answer, "merge")
