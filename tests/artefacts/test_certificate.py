"""certify() and verify(): what is equal passes, and every kind of damage fails."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from forked import Subprocess
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loralab.adapters.folder import CONFIG, RECORD, TENSORS, content_digest, read_json, update_record, write_json
from loralab.artefacts import certificate
from loralab.artefacts.certificate import REFERENCE, certify, compare_afresh, file_digests, verify
from loralab.artefacts.comparison import (
    STORED_LOGITS,
    TOLERANCES,
    Certificate,
    Reference,
    compare,
    logits_of,
    reference_of,
)
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.merge import merge
from loralab.errors import AdapterFileError, BaseMismatchWarning, CertificateError
from loralab.models.kinds import CAUSAL, CLASSIFIER
from loralab.models.load import load
from loralab.tasks.samples import MAX_POSITIONS

MakeAdapter = Callable[..., Path]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


def reference_for(logits: torch.Tensor) -> Reference:
    indices = torch.arange(logits.shape[1]).expand(logits.shape).contiguous()
    total = logits.double().logsumexp(dim=1)
    return Reference(prompts=PROMPTS, values=logits, indices=indices, total=total)


def random_logits(seed: int, rows: int = 7, scale: float = 5.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, 200, generator=draw)


def certified(make_adapter: MakeAdapter, base: Path) -> Path:
    path = make_adapter(base)
    live = load_with_base(path)
    certify(path, live.base.model, live.stored.record["sample"], kind=CAUSAL)
    return path


def reseal(path: Path) -> None:
    """Make the digests fit what the files hold now, as a careful forger would."""
    record = read_json(path / RECORD)
    if (path / CONFIG).exists():
        tensors = safetensors.torch.load_file(path / TENSORS)
        record["digest"] = content_digest(read_json(path / CONFIG), tensors)
    else:
        record["files"] = file_digests(path)
    write_json(path / RECORD, record)


def perturb(file: Path, part: str) -> None:
    """Change one tensor of a safetensors file by a few percent of its size."""
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = tensors[name] * 1.05
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@given(st.integers(0, 1000), st.sampled_from(list(TOLERANCES)), st.booleans())
def test_equal_logits_pass_in_full_and_from_the_short_form(seed: int, precision: str, short: bool) -> None:
    logits = random_logits(seed, scale=20.0)
    reference = reference_for(logits)
    found = compare(reference.smaller(STORED_LOGITS) if short else reference, logits, precision)
    assert found.passed
    assert found.max_logit_difference == 0
    assert found.mean_kl < 1e-9
    assert found.top1_agreement == 1


@given(st.integers(0, 1000))
def test_the_divergence_is_the_textbook_one_and_the_short_form_a_lower_bound(seed: int) -> None:
    p, q = random_logits(seed), random_logits(seed) + 0.3 * random_logits(seed + 1)
    p_log, q_log = p.double().log_softmax(dim=1), q.double().log_softmax(dim=1)
    expected = float((p_log.exp() * (p_log - q_log)).sum(dim=1).mean())
    full, short = (compare(r, q, "fp32") for r in (reference_for(p), reference_for(p).smaller(9)))
    assert full.mean_kl == pytest.approx(expected, rel=1e-4)
    assert 0 < short.mean_kl <= expected * (1 + 1e-6)
    assert not full.passed
    assert not short.passed


def test_numbers_that_are_not_finite_never_pass() -> None:
    logits = random_logits(0)
    for value in (math.nan, math.inf):
        broken = logits.clone()
        broken[3, 100] = value
        assert not compare(reference_for(logits), broken, "bf16").passed


def test_a_constant_added_to_all_logits_is_a_difference() -> None:
    logits = random_logits(0)
    assert not compare(reference_for(logits), logits + 1, "fp32").passed


def test_a_reference_reads_back_as_it_was_written(tmp_path: Path) -> None:
    reference = reference_for(random_logits(0)).smaller(STORED_LOGITS)
    reference.save(tmp_path / REFERENCE)
    again = Reference.read(tmp_path / REFERENCE)
    assert again.prompts == reference.prompts
    for name in ("values", "indices", "total"):
        assert torch.equal(getattr(again, name), getattr(reference, name))


def test_the_last_positions_count_and_a_classifier_has_one_row(tiny_llama_folder: Path, tiny_bert_folder: Path) -> None:
    prompts = [[5] * 3, [6] * 40]
    causal = load(str(tiny_llama_folder)).model
    rows = logits_of(causal.train(), prompts, CAUSAL)
    assert rows.shape == (3 + MAX_POSITIONS, causal.config.vocab_size)
    assert causal.training
    classifier = load(str(tiny_bert_folder), labels=["a", "b", "c"]).model
    assert logits_of(classifier, prompts, CLASSIFIER).shape == (2, 3)


@pytest.mark.interpreter
def test_a_fresh_process_finds_the_adapter_as_it_was(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_adapter(tiny_llama_folder)
    live = load_with_base(path)
    prompts = live.stored.record["sample"]
    found = certify(path, live.base.model, prompts, kind=CAUSAL)
    assert found.max_logit_difference == 0
    assert found.prompts == len(prompts)
    assert found.positions == sum(min(len(ids), MAX_POSITIONS) for ids in prompts)
    monkeypatch.setattr(certificate, "subprocess", Subprocess())  # one interpreter is enough
    assert verify(path) == found
    stored = read_json(path / RECORD)["certificate"]
    assert {key: stored[key] for key in found.to_json()} == found.to_json()
    assert (path / REFERENCE).stat().st_size < 100_000
    load_with_base(path)  # the certificate does not change what the folder is


@pytest.mark.usefixtures("in_this_process")
def test_another_model_than_the_live_one_is_refused(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    path = make_adapter(tiny_llama_folder)
    without = load(str(tiny_llama_folder)).model
    with pytest.raises(CertificateError) as error:
        certify(path, without, PROMPTS, kind=CAUSAL)
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")
    assert read_json(path / RECORD)["certificate"]["passed"] is False
    with pytest.raises(CertificateError):
        verify(path)


@pytest.mark.parametrize("file", [CONFIG, TENSORS, REFERENCE])
@pytest.mark.usefixtures("in_this_process")
def test_one_byte_flipped_anywhere_fails(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, file: str
) -> None:
    path = certified(make_adapter, tiny_llama_folder)
    content = (path / file).read_bytes()
    for place in torch.linspace(0, len(content) - 1, 12).long().tolist():
        shutil.copytree(path, tmp_path / "copy", dirs_exist_ok=True)
        flipped = bytearray(content)
        flipped[place] ^= 1
        (tmp_path / "copy" / file).write_bytes(flipped)
        if file == CONFIG and _means_the_same(content, bytes(flipped)):
            continue
        with pytest.raises(CertificateError):
            verify(tmp_path / "copy")


def _means_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.usefixtures("in_this_process")
def test_a_forged_adapter_fails_by_what_it_does(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = certified(make_adapter, tiny_llama_folder)
    forged = shutil.copytree(path, tmp_path / "tensor")
    perturb(forged / TENSORS, "layers.1.mlp.up_proj.lora_B")
    reseal(forged)
    with pytest.raises(CertificateError) as error:
        verify(forged)
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")
    forged = shutil.copytree(path, tmp_path / "scaling")
    config = read_json(forged / CONFIG)
    write_json(forged / CONFIG, {**config, "lora_alpha": config["lora_alpha"] * 1.05})
    reseal(forged)
    with pytest.raises(CertificateError) as error:
        verify(forged)
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")
    reseal(path)
    verify(path)


@pytest.mark.usefixtures("in_this_process")
def test_a_forged_model_fails_by_what_it_does(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    merge(make_adapter(tiny_llama_folder), tmp_path / "merged")
    perturb(tmp_path / "merged" / "model.safetensors", "layers.1.mlp.up_proj")
    with pytest.raises(CertificateError) as error:
        verify(tmp_path / "merged")
    assert (error.value.code, error.value.field) == ("changed", "model.safetensors")
    reseal(tmp_path / "merged")
    with pytest.raises(CertificateError) as error:
        verify(tmp_path / "merged")
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")


@pytest.mark.usefixtures("in_this_process")
def test_a_file_that_came_or_went_is_noticed(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    merge(make_adapter(tiny_llama_folder), tmp_path / "merged")
    (tmp_path / "merged" / "pytorch_model.bin").touch()
    with pytest.raises(CertificateError) as error:
        verify(tmp_path / "merged")
    assert (error.value.code, error.value.field) == ("changed", "pytorch_model.bin")
    (tmp_path / "merged" / "pytorch_model.bin").unlink()
    (tmp_path / "merged" / REFERENCE).unlink()
    with pytest.raises(CertificateError) as error:
        verify(tmp_path / "merged")
    assert (error.value.code, error.value.field) == ("changed", "path")


@pytest.mark.usefixtures("in_this_process")
def test_a_base_that_changed_under_the_adapter_fails(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    path = certified(make_adapter, base)
    perturb(base / "model.safetensors", "layers.0.self_attn.v_proj")
    with pytest.warns(UserWarning, match="fingerprint"), pytest.raises(CertificateError):
        verify(path)


def test_what_was_never_certified_is_not_verified(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError) as error:
        verify(make_adapter(tiny_llama_folder))
    assert (error.value.code, error.value.field) == ("no_certificate", "path")
    with pytest.raises(AdapterFileError) as error:
        verify(tiny_llama_folder)
    assert (error.value.code, error.value.field) == ("no_record", "path")
    with pytest.raises(AdapterFileError) as error:
        verify(tmp_path / "nowhere")
    assert (error.value.code, error.value.field) == ("no_record", "path")


def test_a_process_that_fails_says_why_in_one_line(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    path = make_adapter(base)
    live: Any = load_with_base(path).base.model
    shutil.rmtree(base)
    with pytest.raises(CertificateError) as found:
        certify(path, live, PROMPTS, kind=CAUSAL)
    assert (found.value.code, found.value.field) == ("cannot_load", "path")
    assert "\n" not in str(found.value)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("changed", ["chat_template", "digest", "fingerprint"])
def test_what_token_ids_do_not_show_is_said_by_verify(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, changed: str
) -> None:
    path = certified(make_adapter, tiny_llama_folder)
    record = read_json(path / RECORD)
    section = "base" if changed == "fingerprint" else "tokenizer"
    record[section][changed] = "another"
    write_json(path / RECORD, record)
    with pytest.warns(BaseMismatchWarning) as caught:
        assert verify(path).passed
    assert len(caught) == 1


@pytest.mark.usefixtures("in_this_process")
def test_a_certificate_says_nothing_twice(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    path = make_adapter(tiny_llama_folder)
    update_record(path, tokenizer={"chat_template": "another"})
    with pytest.warns(BaseMismatchWarning):
        live = load_with_base(path)
    certify(path, live.base.model, PROMPTS, kind=CAUSAL)  # warnings are errors here


def answered(path: Path, place: Path, device: str) -> Certificate:
    """What the fresh process would write."""
    certificate._compare_and_write(str(path), str(place / "request"), str(place / "answer"), device)
    return certificate._read_answer(place / "answer")


@pytest.mark.usefixtures("in_this_process")
def test_the_reloaded_model_computes_where_the_live_one_did(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_adapter(tiny_llama_folder)
    live = load_with_base(path)
    reference_of(live.base.model, PROMPTS, CAUSAL).save(tmp_path / "request")
    moved: list[str] = []
    to = nn.Module.to

    def noted(module: nn.Module, device: Any, *more: Any, **named: Any) -> nn.Module:
        moved.append(str(device))
        if device == "full":
            raise torch.OutOfMemoryError
        return to(module, "cpu" if device == "card" else device, *more, **named)

    monkeypatch.setattr(nn.Module, "to", noted)
    assert answered(path, tmp_path, "card").device == "card"
    assert moved.count("card") == 1
    assert answered(path, tmp_path, "full").device == "cpu"  # the live model leaves it no room
    merge(path, tmp_path / "merged")
    moved.clear()
    assert answered(tmp_path / "merged", tmp_path, "card").device == "card"
    assert moved.count("card") == 1


def test_the_device_of_the_live_model_goes_to_the_fresh_process(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_adapter(tiny_llama_folder)
    found: list[str] = []

    def compare(path: Path, reference: Reference, *_: object) -> Certificate:
        found.append(reference.device)
        logits = logits_of(live.base.model, reference.prompts, CAUSAL)
        return certificate.compare(reference, logits, "fp32", reference.device)

    live = load_with_base(path)
    monkeypatch.setattr(certificate, "_in_fresh_process", compare)
    on_card = replace(reference_of(live.base.model, PROMPTS, CAUSAL), device="card")
    compare_afresh(path, on_card)
    assert read_json(path / RECORD)["certificate"]["device"] == "card"
    verify(path)  # there is no such device here
    monkeypatch.setattr(certificate, "device_here", lambda: SimpleNamespace(type="card"))
    verify(path)
    assert found == ["card", "cpu", "card"]


def test_the_reference_of_a_live_model_is_all_its_logits(tiny_llama_folder: Path) -> None:
    model = load(str(tiny_llama_folder)).model
    reference = reference_of(model, PROMPTS, CAUSAL)
    assert torch.equal(reference.values, logits_of(model, PROMPTS, CAUSAL))
    torch.testing.assert_close(reference.values.double().logsumexp(dim=1), reference.total)
