"""What leaves the laboratory is what was evaluated, and stays so, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import fill
from transformers import AutoModelForCausalLM

from loralab.adapters import folder
from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.artefacts import certificate as certificates
from loralab.artefacts.certificate import REFERENCE, Reference, certify, compare, verify
from loralab.artefacts.export import export
from loralab.artefacts.merge import merge
from loralab.errors import (
    AdapterFileError,
    AdapterStateError,
    CertificateError,
    ConfigError,
    OutputError,
)
from loralab.models.load import load

PROMPTS = [[1, 5, 9, 12], [1, 7, 8], list(range(3, 40))]


def saved(base: Path, place: Path, kind: str = "causal-lm", **options: Any) -> tuple[Any, Path]:
    """A live model, and the folder of the adapter in it."""
    labels = ["no", "yes"] if kind == "sequence-classification" else []
    loaded = load(str(base), labels=labels)
    adapter = fill(attach(loaded.model, LoRA(rank=2, **options)))
    record = {
        "base": {"name": str(base), "kind": kind, "precision": "fp32"},
        "task": {"labels": labels}, "sample": PROMPTS, "tokenizer": {"stop_ids": [2]},
    }  # fmt: skip
    return loaded.model, adapter.save(place, record)


def test_a_saved_adapter_is_certified_and_verified(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, place = saved(tiny_llama_folder, tmp_path / "a")
    found = certify(place, model, PROMPTS, kind="causal-lm")
    assert found.passed
    assert found.max_logit_difference == 0
    assert found.top1_agreement == 1
    assert folder.read(place).record["certificate"]["passed"]
    assert verify(place).passed


def test_the_certificate_of_another_model_fails(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, place = saved(tiny_llama_folder, tmp_path / "a")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B += 0.5
    with pytest.raises(CertificateError, match="does not do what was certified"):
        certify(place, model, PROMPTS, kind="causal-lm")


@pytest.fixture(scope="module")
def certified(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, place = saved(tiny_llama_folder, tmp_path_factory.mktemp("certified") / "a")
    certify(place, model, PROMPTS, kind="causal-lm")
    return place


def corrupt(place: Path, how: str) -> None:
    tensors, config = place / folder.TENSORS, place / folder.CONFIG
    if how == "tensor":
        content = safetensors.torch.load_file(tensors)
        key = sorted(content)[0]
        safetensors.torch.save_file({**content, key: content[key] + 0.1}, tensors)
    elif how == "scaling":
        config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    elif how == "bit":
        data = tensors.read_bytes()
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "gone":
        tensors.unlink()
    elif how == "reference":
        (place / REFERENCE).write_bytes((place / REFERENCE).read_bytes()[:-4] + b"\0\0\0\0")
    elif how == "consistently":  # digest and all: only the logits can tell
        content = safetensors.torch.load_file(tensors)
        changed = {key: value * 1.5 for key, value in content.items()}
        safetensors.torch.save_file(changed, tensors)
        digest = folder.content_digest(folder.read_json(config), changed)
        folder.update_record(place, digest=digest)


@pytest.mark.parametrize("how", ["tensor", "scaling", "bit", "gone", "reference", "consistently"])
def test_a_corrupted_adapter_fails_verification(how: str, certified: Path, tmp_path: Path) -> None:
    import shutil

    place = Path(shutil.copytree(certified, tmp_path / "a"))
    corrupt(place, how)
    with pytest.raises(CertificateError):
        verify(place)


def test_what_has_no_certificate_cannot_be_verified(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    _, place = saved(tiny_llama_folder, tmp_path / "a")
    with pytest.raises(AdapterFileError, match="has no certificate"):
        verify(place)
    with pytest.raises(AdapterFileError, match=r"no loralab\.json"):
        verify(tmp_path)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny_llama_folder", {}),
    ("tiny_llama_folder", {"target_modules": ["lm_head", "q_proj"]}),
    ("tiny_llama_folder", {"modules_to_save": ["lm_head"]}),
    ("tiny_llama_folder", {"init": "pissa"}),
    ("tiny_gpt2_folder", {"scaling": "alpha/sqrt(r)"}),
    ("tiny_bert_folder", {"modules_to_save": ["classifier"]}),
]


@pytest.mark.parametrize(("fixture", "options"), CASES)
def test_the_merged_folder_is_the_live_model(
    fixture: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(fixture)
    kind = "sequence-classification" if "bert" in fixture else "causal-lm"
    model, place = saved(base, tmp_path / "a", kind, **options)
    found = merge(place, tmp_path / "m")
    assert found.passed
    plain = load(str(tmp_path / "m"), kind=kind).model
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    adapted_head = "lm_head" in str(options)
    if fixture == "tiny_llama_folder":
        tied = plain.lm_head.weight is plain.model.embed_tokens.weight
        assert tied is not adapted_head
        original = AutoModelForCausalLM.from_pretrained(base)
        assert torch.equal(original.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_a_merged_folder_is_verified_file_by_file(tiny_llama_folder: Path, tmp_path: Path) -> None:
    _, place = saved(tiny_llama_folder, tmp_path / "a")
    merge(place, tmp_path / "m")
    assert verify(tmp_path / "m").passed
    config = tmp_path / "m" / "generation_config.json"
    assert json.loads(config.read_text())["eos_token_id"] == [2]
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CertificateError, match=r"changed .*generation_config\.json"):
        verify(tmp_path / "m")


def test_an_export_that_differs_is_not_published(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = saved(tiny_llama_folder, tmp_path / "a")
    real = certificates._in_fresh_process

    def worse(path: Path, reference: Reference) -> Any:
        shifted = Reference(
            prompts=reference.prompts, values=reference.values.flip(1).contiguous(),
            indices=reference.indices, total=reference.total,
        )  # fmt: skip
        return real(path, shifted)

    monkeypatch.setattr(certificates, "_in_fresh_process", worse)
    for output, action in (("m", merge), ("p", lambda a, o: export(a, o, to="peft"))):
        with pytest.raises(CertificateError, match="rejected"):
            action(place, tmp_path / output)
        assert not (tmp_path / output).exists()
        assert (tmp_path / f"{output}.rejected").is_dir()


def test_the_exported_adapter_has_the_same_content(tiny_llama_folder: Path, tmp_path: Path) -> None:
    _, place = saved(tiny_llama_folder, tmp_path / "a")
    assert export(place, tmp_path / "p", to="peft").passed
    assert folder.read(tmp_path / "p").digest == folder.read(place).digest
    assert verify(tmp_path / "p").passed


def test_wrong_targets_and_places_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    _, place = saved(tiny_llama_folder, tmp_path / "a")
    with pytest.raises(ConfigError, match="did you mean peft"):
        export(place, tmp_path / "p", to="pfet")
    with pytest.raises(OutputError, match="not empty"):
        merge(place, place)
    with pytest.raises(AdapterFileError):
        merge(tmp_path / "nothing", tmp_path / "m")
    with pytest.raises(ConfigError, match="precision"):
        merge(place, tmp_path / "m", precision="int3")
    assert not (tmp_path / "m").exists()


def test_a_merge_that_overflows_fp16_writes_nothing(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    loaded = load(str(tiny_llama_folder))
    adapter = attach(loaded.model, LoRA(rank=2))
    torch.nn.init.constant_(next(iter(adapter.modules.values())).lora_B, 1e7)
    place = adapter.save(tmp_path / "a", {"base": {"name": str(tiny_llama_folder)}})
    with pytest.raises(AdapterStateError, match="not finite"):
        merge(place, tmp_path / "m", precision="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def reference(logits: torch.Tensor) -> Reference:
    indices = torch.arange(logits.shape[1]).expand(logits.shape).contiguous()
    return Reference(
        prompts=[[1]], values=logits, indices=indices, total=logits.double().logsumexp(1).float()
    )


def test_kl_is_that_of_the_whole_distribution_also_from_the_largest_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    live, other = (torch.randn(5, 400, generator=draw) * 3 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        other.double().log_softmax(1), live.double().softmax(1), reduction="sum"
    ) / 5  # fmt: skip
    whole = compare(reference(live), other, "fp32")
    assert whole.mean_kl == pytest.approx(float(expected), rel=1e-4)
    assert not whole.passed
    same = compare(reference(live).smaller(64), live, "fp32")
    assert same.mean_kl == pytest.approx(0, abs=1e-9)
    assert same.passed
    part = compare(reference(live).smaller(64), other, "fp32")
    assert 0 < part.mean_kl <= whole.mean_kl + 1e-6


def test_logits_that_are_not_finite_never_pass() -> None:
    live = torch.randn(2, 10)
    broken = live.clone()
    broken[0, 0] = float("nan")
    assert not compare(reference(live), broken, "bf16").passed
