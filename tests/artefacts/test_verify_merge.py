"""verify() of merges: peft's own pass in every dtype, each fault is found and named."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merges import DTYPES, edited, opened, write_adapter, write_base, write_merged
from safetensors.torch import load_file, save_file
from tiny import fill
from torch import Tensor

import loralab
from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.artefacts.proof.report import MergeReport
from loralab.cli import run
from loralab.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's, of ties and of Conv1D
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PREFIX = "base_model.model."
HONEST = [
    *((name, "plain", *dtypes) for name in ("llama", "gpt2", "bert") for dtypes in (("bf16",) * 3, ("fp32",) * 3)),
    *(("llama", option, "bf16", "bf16", "bf16") for option in ("rslora", "pattern", "saved_head", "ia3", "bias")),
    *(("tied", option, "fp32", "fp32", "fp32") for option in ("saved_embedding", "saved_head", "tokens")),
    *(("tied", option, "bf16", "bf16", "bf16") for option in ("embedding", "head")),
    *((name, "dora", "bf16", "bf16", "bf16") for name in ("llama", "gpt2")),
    ("gpt2", "embedding", "fp32", "fp32", "fp32"),
    ("bert", "lora_bias", "fp16", "fp16", "fp16"),
    ("llama", "adalora", "bf16", "bf16", "bf16"),
    ("llama", "plain", "bf16", "fp32", "bf16"),
    ("llama", "plain", "fp32", "bf16", "fp32"),
    ("llama", "plain", "bf16", "fp16", "fp16"),
]


@dataclass(frozen=True)
class Merge:
    """Folders that belong together."""

    base: Path
    adapter: Path
    merged: Path
    place: Path

    def verify(self, merged: Path | None = None, **options: Any) -> MergeReport:
        return loralab.verify(merged or self.merged, base=self.base, adapter=self.adapter, **options)

    def edited(self, edit: Callable[[dict[str, Tensor]], Any], **config: Any) -> MergeReport:
        """The report on a merged folder after a change to its tensors."""
        shutil.rmtree(self.place / "edited", ignore_errors=True)
        return self.verify(edited(self.merged, self.place / "edited", edit, **config), logits=False)

    def delta(self, path: str) -> Tensor:
        """B A of a module, scaled."""
        tensors = load_file(self.adapter / "adapter_model.safetensors")
        A, B = (tensors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        return 1.5 * (B @ A)


def made(
    place: Path,
    name: str,
    option: str = "plain",
    base: str = "fp32",
    load: str = "fp32",
    save: str = "fp32",
    way: str = "peft",
) -> Merge:
    folder = write_base(place / "base", name, base)
    adapter = write_adapter(place / "adapter", name, option, folder, base)
    merged = write_merged(place / "merged", name, folder, adapter, load, save, way)
    return Merge(folder, adapter, merged, place)


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Llama in bf16, merged in bf16."""
    return made(tmp_path_factory.mktemp("merge"), "llama", "plain", "bf16", "bf16", "bf16")


WAYS = [(*HONEST[n], way) for n in (0, 2, 4, 15) for way in ("safe", "own")]


@pytest.mark.parametrize(("name", "option", "base", "load", "save", "way"), [*((*h, "peft") for h in HONEST), *WAYS])
def test_an_honest_merge_is_proven(
    tmp_path: Path, name: str, option: str, base: str, load: str, save: str, way: str
) -> None:
    own = made(tmp_path, name, option, base, load, save, way)
    report = own.verify(logits=base == "fp32")
    assert report.passed, report.causes
    assert report.decided
    assert set(report.counts) <= {"exact", "rounded"}
    assert any(verdict.changed for verdict in report.tensors)


def test_the_order_of_rounding_is_told(tmp_path: Path) -> None:
    for way, casts in (("peft", "one cast"), ("safe", "two casts")):
        own = made(tmp_path / way, "llama", "plain", "bf16", "bf16", "bf16", way)
        (order,) = own.verify(logits=False).orders
        assert order.endswith(casts)


def test_logits_are_compared(merge: Merge) -> None:
    report = merge.verify()
    assert report.logits is not None
    assert report.logits.passed
    assert report.logits.precision == "bf16"


def targets(merge: Merge) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{end}" for layer in (0, 1) for end in ("q_proj", "v_proj")]


def again(merge: Merge, factor: float, turned: bool = False, only: tuple[str, ...] = ("q_proj", "v_proj")) -> Any:
    """Merge once more, with another factor, or the update turned over."""
    base = load_file(merge.base / "model.safetensors")

    def edit(tensors: dict[str, Tensor]) -> None:
        for path in targets(merge):
            if path.endswith(only):
                weight, update = base[f"{path}.weight"], merge.delta(path)
                total = weight.float() + factor * (update.T if turned else update)
                tensors[f"{path}.weight"] = total.to(weight.dtype)

    return edit


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(factor=st.floats(-3, 3).filter(lambda f: abs(f - 1) > 0.02 and abs(f) > 0.05))
def test_a_factor_is_found(merge: Merge, factor: float) -> None:
    report = merge.edited(again(merge, factor))
    assert (report.passed, report.causes) == (False, {"scaled": 4})
    for verdict in report.wrong:
        assert verdict.factor == pytest.approx(factor, abs=0.02)


def test_a_missing_update_is_found(merge: Merge) -> None:
    assert merge.edited(again(merge, 0)).causes == {"update_missing": 4}
    assert merge.edited(again(merge, 0, only=("v_proj",))).causes == {"update_missing": 2}


def test_a_transposed_update_is_found(merge: Merge) -> None:
    assert merge.edited(again(merge, 1, turned=True, only=("q_proj",))).causes == {"transposed": 2}

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].T

    assert merge.edited(turn).causes == {"transposed": 1}


def test_swapped_layers_are_found(merge: Merge) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]

    report = merge.edited(swap)
    assert report.causes == {"layer_swapped": 2}
    assert "layers.1.mlp.up_proj" in report.wrong[0].detail


def test_another_adapter_is_found(merge: Merge, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", "llama", "plain", merge.base, "bf16", seed=6)
    report = loralab.verify(merge.merged, base=merge.base, adapter=other, logits=False)
    assert report.causes == {"other_adapter": 4}


def test_another_base_is_found(merge: Merge, tmp_path: Path) -> None:
    def noise(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() + 0.01 * torch.randn(tensor.shape)).to(tensor.dtype)

    other = edited(merge.base, tmp_path / "other", noise)
    report = loralab.verify(merge.merged, base=other, adapter=merge.adapter, logits=False)
    assert set(report.causes) == {"other_base"}


def test_a_tensor_that_nothing_targets_must_not_change(merge: Merge) -> None:
    def scale(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.05

    assert merge.edited(scale).causes == {"changed": 1}


def test_a_number_and_a_nan_are_found(merge: Merge) -> None:
    for value, cause in ((0.3, "changed"), (math.nan, "not_finite")):

        def put(tensors: dict[str, Tensor], value: float = value) -> None:
            tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = value

        assert merge.edited(put).causes == {cause: 1}


def test_a_truncated_vocabulary_is_found(merge: Merge) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-2]

    assert merge.edited(cut).causes == {"truncated_vocabulary": 1}


def test_rows_that_nobody_knows_cannot_be_decided(merge: Merge) -> None:
    def more(tensors: dict[str, Tensor]) -> None:
        rows = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:3]])

    report = merge.edited(more)
    assert (report.passed, report.decided) == (False, False)


def test_a_lost_tensor_is_found(merge: Merge) -> None:
    assert merge.edited(lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}).causes == {
        "missing_tensor": 1
    }


def test_an_adapter_beside_the_base_is_not_merged(merge: Merge) -> None:
    def beside(tensors: dict[str, Tensor]) -> None:
        tensors |= load_file(merge.adapter / "adapter_model.safetensors")

    assert next(iter(merge.edited(beside).causes)) == "not_merged"


def test_a_stale_head_is_found(tmp_path: Path) -> None:
    own = made(tmp_path, "tied", "saved_head")
    head = "lm_head.weight"
    stale = load_file(own.base / "model.safetensors")["model.embed_tokens.weight"]
    assert own.edited(lambda t: t.update({head: stale})).causes == {"head_stale": 1}
    assert own.edited(lambda t: {k: v for k, v in t.items() if k != head}).causes == {"head_stale": 1}
    assert own.edited(lambda t: None, tie_word_embeddings=True).causes == {"tie_stale": 1}


def test_dora_without_its_magnitudes_is_found(tmp_path: Path) -> None:
    own = made(tmp_path, "llama", "dora")
    assert own.edited(again(own, 1)).causes == {"dora_missing": 4}


def test_another_prefix_and_dtype_are_no_fault(merge: Merge) -> None:
    report = merge.edited(lambda t: {f"base_model.model.{k}": v.float() for k, v in t.items()})
    assert report.passed


def test_experts_in_one_parameter_are_replayed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = write_base(tmp_path / "base", "llama", "fp32")
    experts = torch.randn(3, 8, 6, generator=generator)
    name = "model.layers.0.mlp.experts.down_proj"
    base = edited(base, tmp_path / "experts", lambda t: t.update({name: experts}))
    A, B = torch.randn(6, 6, generator=generator), torch.randn(8, 6, generator=generator)
    tensors = {f"{PREFIX}model.layers.0.mlp.experts.lora_{part}.weight": t for part, t in (("A", A), ("B", B))}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["mlp.experts.down_proj"]}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    update = 1.5 * torch.einsum("ore,eri->eoi", B.view(8, 2, 3), A.view(3, 2, 6))  # as peft lays them out
    for factor, passed in ((1, True), (2, False)):
        whole = edited(base, tmp_path / str(factor), lambda t, f=factor: t.update({name: experts + f * update}))
        assert loralab.verify(whole, base=base, adapter=adapter, logits=False).passed == passed


def test_experts_one_by_one_are_not_decided(merge: Merge, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.w1.weight"
    folders = [
        edited(f, tmp_path / f.name, lambda t: t.update({name: torch.ones(8, 6)})) for f in (merge.base, merge.merged)
    ]
    adapter = tmp_path / "adapter"
    shutil.copytree(merge.adapter, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for part, shape in (("A", (12, 6)), ("B", (8, 12))):
        tensors[f"{PREFIX}model.layers.0.mlp.experts.lora_{part}.weight"] = torch.ones(shape)
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = loralab.verify(folders[1], base=folders[0], adapter=adapter, logits=False)
    assert (report.passed, report.decided) == (False, False)
    assert [verdict.name for verdict in report.undecided] == ["model.layers.0.mlp.experts"]


def test_options_of_a_merge_need_an_adapter(merge: Merge) -> None:
    assert run(["verify", str(merge.merged), "--no-logits"]) == 2


def as_gguf(folder: Path, file: Path, kind: str) -> Path:
    """A Llama in llama.cpp's names and rows."""
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in ((writer.add_block_count, 2), (writer.add_head_count, 4), (writer.add_head_count_kv, 2)):
        add(value)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in name else 2
            own = own.view(heads, 2, len(own) // heads // 2, -1).swapaxes(1, 2).reshape(own.shape)
        theirs = table.get_name(name, try_suffixes=(".weight",))
        if own.ndim == 1 or own.shape[1] % 32:
            writer.add_tensor(theirs, own.numpy())
        else:
            code = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(theirs, gguf.quants.quantize(own.contiguous().numpy(), code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_verified(merge: Merge, tmp_path: Path, kind: str) -> None:
    report = merge.verify(as_gguf(merge.merged, tmp_path / "merged.gguf", kind))
    assert report.passed
    assert (report.survived is None) == kind.startswith("F")
    assert report.survived is None or report.survived > 0.9
    base = as_gguf(merge.base, tmp_path / "base.gguf", kind)
    assert merge.verify(base).causes == {"update_missing": 4}
    if kind == "F32":
        assert loralab.verify(tmp_path / "merged.gguf", base=base, adapter=merge.adapter).passed


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_shards_are_read(tmp_path: Path, dtype: str) -> None:
    own = made(tmp_path, "llama", "plain", dtype, dtype, dtype)
    parted = tmp_path / "parted"
    shutil.copytree(own.merged, parted)
    tensors = load_file(parted / "model.safetensors")
    (parted / "model.safetensors").unlink()
    halves: dict[str, dict[str, Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        halves.setdefault(f"model-0000{1 + number % 2}-of-00002.safetensors", {})[name] = tensor
    for file, half in halves.items():
        save_file(half, parted / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (parted / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert own.verify(parted, logits=False).passed
    shard = parted / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    for content, code in ((whole[:-7], "truncated"), (whole[:4], "damaged"), (None, "missing_shard")):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(InputError) as caught:
            own.verify(parted)
        assert (caught.value.code, caught.value.field) == (code, "merged")
        shard.touch()


def test_what_does_not_belong_together_is_refused(merge: Merge, tmp_path: Path) -> None:
    other = made(tmp_path, "gpt2")
    small = write_base(tmp_path / "tied", "tied", "fp32")
    cases = [
        (other.merged, merge.base, merge.adapter, "other_architecture"),
        (merge.merged, merge.base, other.adapter, "other_base"),
        (merge.merged, merge.base, merge.base, "no_adapter"),
        (merge.adapter, merge.base, merge.adapter, "adapter_as_model"),
        (merge.merged, tmp_path / "nowhere", merge.adapter, "unknown_model"),
        (tmp_path, small, merge.adapter, "no_config"),
    ]
    for merged, base, adapter, code in cases:
        with pytest.raises(InputError) as caught:
            loralab.verify(merged, base=base, adapter=adapter)
        assert caught.value.code == code


def test_what_nobody_can_replay_is_not_decided(merge: Merge, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(merge.adapter, adapter)
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    for change in ({"init_lora_weights": "pissa"}, {"peft_type": "VERA"}, {"some_new_option": True}):
        file.write_text(json.dumps(fields | change), encoding="utf-8")
        report = loralab.verify(merge.merged, base=merge.base, adapter=adapter)
        assert (report.passed, report.decided) == (False, False)


def test_exit_codes(merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--base", str(merge.base), "--adapter", str(merge.adapter), "--no-logits"]
    assert run(["verify", str(merge.merged), *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["decided"], found["causes"]) == (True, True, {})
    stale = edited(merge.merged, tmp_path / "stale", again(merge, 0))
    assert run(["verify", str(stale), *common]) == 1
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "model.layers.0.self_attn.q_proj.weight" in "".join(row[1].strip() for row in rows)
    odd = edited(merge.merged, tmp_path / "odd", lambda t: t.update({"other.weight": torch.ones(2)}))
    assert run(["verify", str(odd), *common]) == 3
    assert run(["verify", str(tmp_path / "nowhere"), *common]) == 2


def test_our_own_merge_is_proven(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "tied", "fp32")
    model = opened("tied", base, "fp32")
    adapter = fill(attach(model, LoRA(rank=3, target_modules=("q_proj", "lm_head"))))
    adapter.save(tmp_path / "adapter")
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    assert loralab.verify(tmp_path / "merged", base=base, adapter=tmp_path / "adapter", logits=False).passed
