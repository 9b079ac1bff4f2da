"""Inference: routed adapters are exact, smaller models what they claim, words follow numbers."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, setup_of
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.bases import shared_copy
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterStateError, ConfigError
from loralab.models.load import Base
from loralab.studies.measures import deployed
from loralab.studies.measures.decoding import Variant, decoded, interleaved
from loralab.studies.measures.mixed_batch import Banked, Looped, as_large
from loralab.studies.message import Message
from loralab.studies.questions import inference
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup

SETUP = StudySetup(study="inference", model="m", data="d")
QUICK = StudySetup(study="inference", model="m", data="d", quick=True)
RIGHT, WRONG = [1.0] * 50 + [0.0] * 10, [1.0] * 30 + [0.0] * 30


def base(model: Any, kind: str = "causal-lm") -> Base:
    return Base(name="tiny", model=model, tokenizer=None, kind=kind, source="")


WAYS = {"banked": Banked, "looped": Looped}


def routed(adapter: Adapter, count: int, way: str = "banked") -> tuple[Any, Any, list[Adapter]]:
    """Return the base of an adapted model with several adapters on it, the trained one first."""
    model = adapter.detach()
    adapters = as_large(adapter, model, count)
    return model, WAYS[way](model, adapters), adapters


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert], ids=["llama", "gpt2", "bert"])
def test_every_row_goes_through_its_own_adapter(make: tiny.Make, way: str) -> None:
    adapter = tiny.fill(attach(make(), LoRA(rank=4)))
    path = next(iter(adapter.modules))
    model, mixed, adapters = routed(adapter, 3, way)
    x = torch.randn(4, 5, adapters[0].modules[path].lora_A.shape[1])
    plain = model.get_submodule(path)(x).double()
    mixed.route([0, 1, 2, 2])
    found = model.get_submodule(path)(x)
    for row, number in enumerate([0, 1, 2, 2]):
        A, B, scaling = adapters[number].modules[path].factors()
        update = x[row].double() @ A.T.double() @ B.T.double()
        want = (plain[row] + scaling * update).float()  # by the definition, in float64
        torch.testing.assert_close(found[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert], ids=["llama", "gpt2", "bert"])
def test_a_routed_model_gives_what_the_adapted_one_gives(make: tiny.Make) -> None:
    adapter = tiny.fill(attach(make(), LoRA(rank=4)))
    alone = tiny.logits(adapter.model)
    model, mixed, _ = routed(adapter, 4)
    mixed.route([0, 0])
    torch.testing.assert_close(tiny.logits(model), alone, rtol=1e-4, atol=1e-4)
    mixed.route([0, 3])
    both = tiny.logits(model)
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[1], alone[1], atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_sees_other_rows_refuses(way: str) -> None:
    model, mixed, _ = routed(tiny.fill(attach(tiny.llama(), LoRA(rank=2))), 2, way)
    mixed.route([0, 1, 1])
    with pytest.raises(AdapterStateError) as caught:
        tiny.logits(model)
    assert "3 rows" in str(caught.value)


def test_the_factors_of_a_half_precision_base_stay_in_their_own_dtype() -> None:
    adapter = tiny.fill(attach(tiny.llama().to(torch.bfloat16), LoRA(rank=2)))
    alone = tiny.logits(adapter.model)
    for way in WAYS.values():
        model = shared_copy(tiny.llama().to(torch.bfloat16))
        adapters = as_large(adapter, shared_copy(model), 2)
        assert {p.dtype for p in adapters[1].parameters()} == {torch.float32}
        way(model, adapters).route([0, 0])
        torch.testing.assert_close(tiny.logits(model), alone, rtol=0.1, atol=0.1)


def test_a_copy_shares_every_weight_and_no_module() -> None:
    model = tiny.llama()
    other = shared_copy(model)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours is theirs
    attach(other, LoRA(rank=2))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_others_are_as_large_as_the_trained_one() -> None:
    adapter = tiny.fill(attach(tiny.llama(), LoRA(rank=4)))
    first, *others = as_large(adapter, adapter.detach(), 5)
    assert first is adapter
    for number, own in enumerate(p.detach() for p in adapter.parameters()):
        found = torch.stack([other.parameters()[number].detach() for other in others])
        assert found.shape == (4, *own.shape)
        assert not (found == own).any()
        assert float(found.std()) == pytest.approx(float(own.std()), rel=0.2)


def test_pruning_zeroes_the_smallest_half() -> None:
    model = tiny.llama()
    layer, other = (model.model.layers[n].mlp.up_proj for n in range(2))
    with torch.no_grad():
        other.weight.fill_(1.0)
    before = layer.weight.clone()
    less = deployed.pruned(base(model))
    assert torch.equal(layer.weight, before), "the dense one stays"
    found = less.model.layers[0].mlp.up_proj.weight
    kept = found != 0
    assert float(kept.double().mean()) == 0.5
    assert torch.equal(found[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    ties = less.model.layers[1].mlp.up_proj.weight
    assert int((ties == 0).sum()) == ties.numel() // 2, "no more than asked for, where all are as small"
    assert not (less.lm_head.weight == 0).any()


def test_int8_and_nf4_are_near_the_dense_model_and_smaller() -> None:
    model = tiny.llama()
    dense = deployed.weight_bytes(model)
    linear = sum(m.weight.numel() for _, m in deployed._layers(base(model)))
    int8 = deployed.in_int8(base(model))
    rows = sum(m.out_features for _, m in deployed._layers(base(model)))
    assert deployed.weight_bytes(int8) == dense - 3 * linear + deployed.OF_A_ROW * rows
    torch.testing.assert_close(tiny.logits(int8), tiny.logits(model), rtol=0.2, atol=0.2)
    nf4 = deployed.in_nf4(base(model))
    assert deployed.weight_bytes(nf4) < dense - 3 * linear
    assert deployed.weight_bytes(model) == dense, "the dense one stays as it is"


def test_weights_are_counted_once_where_they_are_shared() -> None:
    model = tiny.llama()
    assert deployed.weight_bytes(model) >= 4 * sum(p.numel() for p in model.parameters())
    both = nn.ModuleList([model, shared_copy(model)])
    assert deployed.weight_bytes(both) == deployed.weight_bytes(model)


@torch.no_grad()
def test_decoding_with_a_cache_writes_what_decoding_without_writes() -> None:
    model, seen = tiny.llama(), []
    forward = model.forward

    def watched(**given: Any) -> Any:
        out = forward(**given)
        seen.append(int(out.logits[0, -1].argmax()))
        return out

    model.forward = watched  # its names are hidden: all logits are made
    _, spent = decoded(model, tiny.IDS[:1], tokens=3)
    model.forward, ids, want = forward, tiny.IDS[:1], []
    for _ in range(4):
        want.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[want[-1]]])], dim=1)
    assert seen == want
    assert len(spent) == 3


def test_all_variants_are_timed_equally_often() -> None:
    model = tiny.llama()
    variants = [Variant(name=name, model=model) for name in "ab"]
    found = interleaved(base(model), variants, [1, 2], seconds=600.0, most=6)
    assert {(v.name, batch): len(own) for (v, batch), own in found.items()} == {
        (name, batch): 6 for name in "ab" for batch in (1, 2)
    }


def test_arms_and_values() -> None:
    names = [own.name for own in inference.arms(QUICK, base(tiny.llama()))]
    assert names == ["r=8", "latency", "int8", "NF4", "50 % zeros"]
    own = StudySetup(study="inference", model="m", data="d", values=("nf4",))
    assert [a.name for a in inference.arms(own, base(tiny.llama()))] == ["r=8", "NF4"]
    wrong = StudySetup(study="inference", model="m", data="d", values=("nf3",))
    with pytest.raises(ConfigError) as caught:
        inference.arms(wrong, base(tiny.llama()))
    assert (caught.value.code, caught.value.field) == ("invalid_choice", "values")


def timed(
    arm: str,
    control: str,
    factors: dict[str, tuple[float, float]],
    *,
    noise: float = 0.002,
    trials: int = 12,
    items: dict[str, list[float]] | None = None,
    **numbers: float,
) -> Record:
    """Return a record of variants that take so many times the control's 40 and 80 ms."""
    draw = random.Random(arm)
    rows = [
        {
            "variant": name,
            "batch": batch,
            "control": control,
            "seconds": [scale * factor * (1 + draw.gauss(0, noise)) for _ in range(trials)],
            "prompt": [0.1] * trials,
        }
        for name, both in {control: (1.0, 1.0), **factors}.items()
        for batch, scale, factor in zip((1, 8), (0.04, 0.08), both, strict=True)
    ]
    weights = [{"variant": name, "bytes": 2.7e8, "working": None} for name in (control, *factors)]
    return Record(
        arm=Arm(name=arm, plain=True),
        seed=0,
        items=items or {},
        numbers=numbers,
        tables={"latency": rows, "weights": weights, "refused": []},
        texts={"metric": "accuracy", "unit": "token"},
    )


ADAPTERS = {
    "merged": (1.0, 1.0),
    "unmerged": (1.4, 1.2),
    "2 adapters": (1.6, 1.3),
    "8 adapters": (1.6, 1.3),
    "64 adapters": (1.6, 1.3),
}
USED = timed("latency", "base", ADAPTERS, switch_seconds=0.32, adapter_bytes=9.8e6)


def test_nothing_timed_says_so() -> None:
    answer = inference.conclude([], SETUP)
    assert answer.sentence.key == "answer.nothing"
    assert [label.key for label, _ in answer.blanks] == [
        "inference.speed_label",
        "inference.many_label",
        "inference.others_label",
        "inference.view_label",
    ]
    assert {said.key for _, said in answer.blanks} == {"answer.not_measured"}
    assert_it_renders(answer, "inference")


def takes(answer: Answer, way: str, batch: int = 1) -> Finding:
    """Return the finding on the time of a way at a batch."""
    for finding in answer.findings:
        said = finding.sentence
        name = said.values.get("way")
        if said.values.get("batch") == batch and way == (name.key if isinstance(name, Message) else name):
            return finding
    raise AssertionError(way)


def test_merged_is_as_quick_and_unmerged_is_slower() -> None:
    answer = inference.conclude([USED], SETUP)
    assert message_in(answer.sentence, "inference.merged_equivalent").values["share"] == pytest.approx(0, abs=0.01)
    slower = takes(answer, "inference.unmerged")
    assert (slower.verdict, slower.holds, slower.sentence.key) == ("worse", True, "inference.takes_worse")
    assert slower.sentence.values["share"] == pytest.approx(0.4, abs=0.01)
    assert slower.effect == -slower.sentence.values["share"]
    assert takes(answer, "inference.unmerged", 8).sentence.values["share"] == pytest.approx(0.2, abs=0.01)
    same = takes(answer, "inference.merged")
    assert (same.verdict, same.holds) == ("equivalent", False)
    speed, many, others, _ = (said for _, said in answer.blanks)
    pays = message_in(speed, "inference.pays").values
    assert pays["cost"] == 0.32
    assert pays["tokens"] == pytest.approx(20, rel=0.05)
    gain = message_in(many, "inference.gain").values
    assert gain["gain"] == pytest.approx(8 * 0.04 * 1.4 / (0.08 * 1.3), rel=0.02)
    assert gain["way"].values["count"] == 64
    assert message_in(many, "inference.held").values == {"adapter": 9.8e6, "base": 2.7e8}
    assert others.key == "answer.not_measured"
    assert_it_renders(answer, "inference")


def test_smaller_models_stand_against_their_own_control() -> None:
    quick = timed("int8", "dense", {"int8": (0.5, 0.6)}, items={"dense": RIGHT, "int8": RIGHT})
    zeros = timed(
        "50 % zeros", "dense", {"50 % zeros": (1.0, 1.0)}, sparse_ratio=7.0, items={"dense": RIGHT, "50 % zeros": WRONG}
    )
    answer = inference.conclude([USED, quick, zeros], SETUP)
    assert takes(answer, "int8").sentence.values["share"] == pytest.approx(-0.5, abs=0.01)
    assert takes(answer, "int8").verdict == "better"
    assert takes(answer, "50 % zeros").verdict == "equivalent"
    scores = {str(f.sentence.values["a"]): f.verdict for f in answer.findings if "a" in f.sentence.values}
    assert scores == {"int8": "equivalent", "50 % zeros": "worse"}
    (way,) = message_in(answer.sentence, "inference.quicker").values["parts"]
    assert (way.key, way.values["way"]) == ("inference.quicker_way", "int8"), "int8 scores alike"
    assert message_in(answer.blanks[2][1], "inference.sparse").values["ratio"] == 7.0
    assert message_in(answer.blanks[3][1], "inference.view_quick").values["ways"] == ["int8"]
    assert len(answer.tables[0].rows) == 6 + 2 + 2
    assert_it_renders(answer, "inference")


def test_what_is_quicker_at_the_price_of_score_says_so() -> None:
    quick = timed("int8", "dense", {"int8": (0.5, 0.6)}, items={"dense": RIGHT, "int8": WRONG})
    (way,) = message_in(inference.conclude([quick], SETUP).sentence, "inference.quicker").values["parts"]
    assert way.key == "inference.quicker_at_a_price"
    assert way.values["price"].values["value"] == pytest.approx(20 / 60)


def test_nothing_is_called_quicker_that_is_not() -> None:
    slow = timed("NF4", "dense", {"NF4": (3.0, 2.0)})
    answer = inference.conclude([slow], SETUP)
    assert message_in(answer.sentence, "inference.none_quicker").values["ways"] == ["NF4"]
    assert answer.blanks[0][1].key == "answer.not_measured"


def test_few_trials_claim_nothing() -> None:
    few = timed("latency", "base", ADAPTERS, trials=3)
    answer = inference.conclude([few], SETUP)
    assert {f.verdict for f in answer.findings} == {"undecided"}
    assert not any(f.holds for f in answer.findings)
    assert "inference.merged_undecided" in keys_in(answer.sentence)
    assert_it_renders(answer, "inference")


def test_a_difference_within_five_percent_is_none_however_sure() -> None:
    near = timed("latency", "base", {"merged": (1.03, 1.03)}, noise=1e-4, trials=40)
    answer = inference.conclude([near], SETUP)
    assert takes(answer, "inference.merged").verdict == "equivalent"
    assert "inference.merged_equivalent" in keys_in(answer.sentence)


def test_models_that_write_nothing_give_rows_a_second() -> None:
    passes = Record(**{**vars(USED), "texts": {"metric": "accuracy", "unit": "pass"}})
    answer = inference.conclude([passes], SETUP)
    assert answer.tables[1].columns[1].heading.key == "inference.rows_at"
    assert answer.figures[1].y.key == "axis.rows_per_second"
    assert_it_renders(answer, "inference")


def test_what_could_not_be_measured_is_shown_with_its_reason() -> None:
    refused = [{"variant": "64 adapters", "reason": "too large"}]
    left = Record(**{**vars(USED), "tables": {**USED.tables, "refused": refused}})
    assert list(inference.conclude([left], SETUP).tables[2].rows) == refused


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_tiny_study_runs_to_its_end(
    kind: str,
    here: Here,
    tiny_llama_folder: Path,
    tiny_bert_folder: Path,
    noise_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "SECONDS", ((0.1, 0.1), (0.1, 0.1)))
    monkeypatch.setattr(inference, "TRIALS", (6, 6))
    folder = tiny_llama_folder if kind == "llama" else tiny_bert_folder
    setup = setup_of("inference", folder, noise_file, seeds=1, fields={"learning_rate": 0.02})
    records = here(setup, tmp_path)
    assert {r.arm.name: r.reason for r in records if r.reason} == {}
    found = {r.arm.name: r for r in records}
    assert not found["latency"].tables["refused"]
    assert found["latency"].numbers["routed_difference"] < 1e-4
    assert found["latency"].items["merged"] == found["latency"].items["unmerged"]
    answer = inference.conclude(records, setup)
    assert len(answer.blanks) == 4
    assert all(said.key != "answer.not_measured" for _, said in answer.blanks)
    assert len(answer.figures) == 2
    assert_it_renders(answer, "inference")
