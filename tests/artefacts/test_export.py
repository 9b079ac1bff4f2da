"""export(): every target gives a folder with a certificate that can be verified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, RECORD, read_json, write_json
from loralab.adapters.methods import LoRA
from loralab.artefacts.certificate import REFERENCE, certify, verify
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.export import TARGETS, export
from loralab.artefacts.loaded_adapter import label_names, load_with_base
from loralab.errors import AdapterFileError, CertificateError, ConfigError, OutputError
from loralab.models.kinds import CAUSAL, CLASSIFIER

MakeAdapter = Callable[..., Path]


def live_logits(adapter: Path) -> torch.Tensor:
    live = load_with_base(adapter)
    return logits_of(live.base.model, live.stored.record["sample"], CAUSAL)


def logits_in_peft(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    loaded: Any = peft.PeftModel.from_pretrained(model, str(adapter))
    sample = folder.read(adapter).record["sample"]
    return logits_of(loaded.eval(), sample, CAUSAL)


@pytest.mark.parametrize("target", ["peft", "merged"])  # the others: test_engines.py, test_gguf.py
def test_a_target_is_proven_by_a_fresh_process_and_verified_later(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, target: str
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    found = export(adapter, tmp_path / "out", to=target)
    assert found.passed
    assert read_json(tmp_path / "out" / RECORD)["certificate"]["passed"] is True
    assert (tmp_path / "out" / REFERENCE).is_file()
    assert verify(tmp_path / "out").passed
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
@pytest.mark.usefixtures("in_this_process")
def test_peft_reads_the_export_and_gives_the_same_logits(
    make_adapter: MakeAdapter, tiny_gpt2_folder: Path, tmp_path: Path
) -> None:
    config = LoRA(
        rank=4,
        alpha=3,
        scaling="alpha/sqrt(r)",
        init="pissa",
        rank_pattern={"c_fc": 2},
        alpha_pattern={r"h\.1\.attn\.c_attn": 9},
    )
    adapter = make_adapter(tiny_gpt2_folder, config)
    export(adapter, tmp_path / "out", to="peft")
    assert read_json(tmp_path / "out" / CONFIG)["base_model_name_or_path"] == str(tiny_gpt2_folder)
    torch.testing.assert_close(
        logits_in_peft(tiny_gpt2_folder, tmp_path / "out"), live_logits(adapter), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("in_this_process")
def test_an_old_certificate_is_not_taken_along(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    live = load_with_base(adapter)
    certify(adapter, live.base.model, [[5, 6]], kind=CAUSAL)
    found = export(adapter, tmp_path / "out", to="peft")
    assert found.prompts == len(live.stored.record["sample"])
    certificate = read_json(tmp_path / "out" / RECORD)["certificate"]
    assert certificate["prompts"] == found.prompts
    assert folder.read(tmp_path / "out").digest == folder.read(adapter).digest


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_that_peft_wrote_is_exported_too(tiny_llama_folder: Path, tmp_path: Path, target: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    found = export(tmp_path / "theirs", tmp_path / "out", to=target)
    assert found.passed
    assert found.prompts > 1
    assert verify(tmp_path / "out").passed


def test_an_adapter_that_names_no_base_asks_for_it(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    (adapter / RECORD).unlink()
    write_json(adapter / CONFIG, {**read_json(adapter / CONFIG), "base_model_name_or_path": None})
    with pytest.raises(AdapterFileError) as error:
        export(adapter, tmp_path / "out", to="peft")
    assert (error.value.code, error.value.field) == ("base_needed", "model")


def test_classes_without_names_are_numbered(make_adapter: MakeAdapter, tiny_bert_folder: Path) -> None:
    config = LoRA(rank=2, modules_to_save=["classifier"])
    adapter = make_adapter(tiny_bert_folder, config, kind=CLASSIFIER, labels=["a", "b", "c"])
    assert label_names(folder.read(adapter)) == ["a", "b", "c"]
    (adapter / RECORD).unlink()
    assert label_names(folder.read(adapter)) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert load_with_base(adapter, model=str(tiny_bert_folder)).base.model.config.num_labels == 3


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_that_differs_is_not_published(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    _reload_without_adapter(monkeypatch)
    with pytest.raises(CertificateError) as error:
        export(adapter, tmp_path / "out", to=target)
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / RECORD).is_file()


def _reload_without_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload every artefact with one weight off."""
    from loralab.artefacts import certificate

    original = certificate._reload

    def off(path: Path, device: str, base: str | None) -> Any:
        base, precision = original(path, device, base)
        with torch.no_grad():
            next(base.model.parameters()).mul_(1.5)
        return base, precision

    monkeypatch.setattr(certificate, "_reload", off)


def test_an_unknown_target_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export(tmp_path, tmp_path / "out", to="merge")
    assert (error.value.code, error.value.field) == ("unknown_target", "to")


@pytest.mark.parametrize("target", TARGETS)
def test_a_place_that_is_taken_is_refused(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError) as error:
        export(make_adapter(tiny_llama_folder), tmp_path / "out", to=target)
    assert (error.value.code, error.value.field) == ("output_exists", "output")
