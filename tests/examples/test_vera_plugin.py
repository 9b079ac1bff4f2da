"""The example method: peft reads its files and it reads peft's, and the command line has it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import PLUGIN, registered, vera_plugin
from tiny import fill, gpt2, llama, logits
from torch import nn

from loralab import attach, load
from loralab.adapters import folder, registry
from loralab.adapters.grouped import Bank, Span
from loralab.artefacts import certificate
from loralab.cli import run
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.serving.adapters.loader import AdapterLoader
from loralab.studies.questions.methods import arms
from loralab.studies.study import StudySetup

peft = pytest.importorskip("peft")
VeRA: Any = vera_plugin().VeRA
TARGETS = ["q_proj", "v_proj", "down_proj"]  # of three shapes


@pytest.fixture
def known() -> Iterator[None]:
    with registered(vera_plugin().SPEC):
        yield


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package as an installer leaves it."""
    info = tmp_path / "site" / "loralab_vera-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loralab-vera\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[loralab.methods]\nvera = vera_plugin:SPEC\n")
    for place in (PLUGIN, tmp_path / "site"):
        monkeypatch.syspath_prepend(place)
    with registered():
        registry._LOADED.discard("plugins")
        yield


@pytest.mark.usefixtures("known")
@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stored", [True, False])
def test_peft_computes_the_same_from_our_folder(stored: bool, tmp_path: Path) -> None:
    config = VeRA(rank=5, target_modules=TARGETS, projection_seed=3, save_projection=stored)
    adapter = fill(attach(llama(), config))
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(adapter.model), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    assert folder.read(tmp_path / "theirs").tensors.keys() == adapter.tensors().keys()
    assert ("base_model.vera_A" in adapter.tensors()) is stored


@pytest.mark.usefixtures("known")
@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stored", [True, False])
def test_we_compute_the_same_from_a_folder_of_pefts(stored: bool, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=5, target_modules=TARGETS, projection_prng_key=3, save_projection=stored, d_initial=0.2)
    theirs = peft.get_peft_model(llama(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "a")
    adapter = load(llama(), tmp_path / "a")
    torch.testing.assert_close(logits(adapter.model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert (adapter.config.rank, adapter.config.d_initial) == (5, 0.2)


@pytest.mark.usefixtures("known")
def test_an_option_of_pefts_that_it_does_not_have_is_refused(tmp_path: Path) -> None:
    attach(llama(), VeRA(rank=5)).save(tmp_path / "a")
    fields = json.loads((tmp_path / "a" / folder.CONFIG).read_text())
    (tmp_path / "a" / folder.CONFIG).write_text(json.dumps({**fields, "bias": "all"}))
    (tmp_path / "a" / folder.RECORD).unlink()
    with pytest.raises(ValueError) as error:
        load(llama(), tmp_path / "a")
    assert (error.value.code, error.value.field) == ("unknown_option", "vera")


@pytest.mark.usefixtures("known")
def test_all_layers_share_two_matrices_that_the_seed_decides() -> None:
    layers = [m.layer for m in attach(gpt2(), VeRA(rank=4, projection_seed=1)).modules.values()]
    assert len({layer.vera_A.data_ptr() for layer in layers}) == 1
    assert layers[0].vera_A.shape == (4, 128)
    other = next(iter(attach(gpt2(), VeRA(rank=4, projection_seed=2)).modules.values())).layer
    assert not torch.equal(layers[0].vera_A, other.vera_A)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1.5}, {"dropout": 1.0}])
def test_values_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VeRA(**options)


@pytest.mark.usefixtures("known")
def test_it_is_served_beside_others(tmp_path: Path) -> None:
    places = []
    for seed in (1, 2):
        adapter = fill(attach(llama(), VeRA(rank=4)), seed)
        places.append(adapter.save(tmp_path / str(seed), {"base": {"kind": "causal-lm"}}))
    expected = [logits(load(llama(), place).model) for place in places]
    base = Base(name="tiny", model=llama(), tokenizer=None, kind="causal-lm", source="")
    nursery, bank = AdapterLoader(base), Bank(base.model)
    for name, place in zip("ab", places, strict=True):
        bank.put(name, nursery.load(folder.read(place)).adapter)
    with bank.routed([Span("b", 0, 1), Span("a", 1, 2)]):
        found = logits(base.model)
    torch.testing.assert_close(found[0], expected[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("known")
def test_the_study_of_methods_has_it() -> None:
    ground = StudySetup(study="methods", model="m", data="d", values=("vera", "ia3"))
    base = Base(name="tiny", model=llama(), tokenizer=None, kind="causal-lm", source="")
    assert {"vera", "ia3"} <= {arm.fields.get("method") for arm in arms(ground, base)}


@pytest.mark.usefixtures("installed")
def test_it_is_trained_certified_and_merged_from_the_command_line(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, merged = tmp_path / "run", tmp_path / "merged"
    common = [
        "--model",
        str(tiny_llama_folder),
        "--data",
        str(sums_file),
        "--method",
        "vera",
        "--rank",
        "4",
        "--d-initial",
        "0.2",
        "--no-save-projection",
        "--max-steps",
        "4",
        "--batch-size",
        "4",
        "--max-length",
        "64",
        "--precision",
        "fp32",
    ]
    assert run(["plan", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] > 0
    assert run(["train", *common, "--output-dir", str(output), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["passed"]
    assert folder.read(output).config.d_initial == 0.2
    again = ["train", "--config", str(output / "config.toml"), "--output-dir"]
    assert run([*again, str(tmp_path / "again"), "--quiet", "--json"]) == 0
    assert folder.read(tmp_path / "again").digest == folder.read(output).digest
    assert run(["merge", str(output), str(merged)]) == 0
    assert run(["verify", str(merged)]) == 0
    assert run(["evaluate", "--adapter", str(output), "--data", str(sums_file), "--json"]) == 0
    assert run(["export", "--to", "peft", str(output), str(tmp_path / "peft")]) == 0


@pytest.mark.usefixtures("installed")
def test_its_fields_are_options_beside_a_configuration_file_too(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my config.toml"
    file.write_text(f'model = "{tiny_llama_folder}"\ndata = "{sums_file}"\nmethod = "vera"\nrank = 9\n')
    assert run(["plan", "--config", str(file), "--rank", "3", "--projection-seed", "5", "--json"]) == 0
    assert {m["rank"] for m in json.loads(capsys.readouterr().out)["modules"]} == {3}
    assert run(["train", "--method", "vera", "--help"]) == 0
    assert "--projection-seed" in capsys.readouterr().out
    assert run(["train", "--help"]) == 0
    assert "--projection-seed" not in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("more", [["--alpha", "3"], ["--d-initial", "much"], ["--width", "3"]])
def test_options_of_others_and_wrong_values_are_refused(
    more: list[str], tiny_llama_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    common = ["--model", str(tiny_llama_folder), "--data", str(sums_file), "--method=vera"]
    assert run(["train", *common, *more, "--output-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.interpreter
@pytest.mark.usefixtures("known")
def test_a_fresh_interpreter_finds_what_was_registered_here(tmp_path: Path) -> None:
    told = registry.environment()
    code = "from loralab.adapters.registry import method_named; print(method_named('vera')[0].name)"
    told["PYTHONPATH"] += f":{PLUGIN}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=told)
    assert done.stdout.strip() == "vera"
    assert certificate.registry is registry


def test_the_package_stays_short_and_offers_what_the_test_does() -> None:
    assert len((PLUGIN / "vera_plugin.py").read_text().splitlines()) < 150
    assert 'vera = "vera_plugin:SPEC"' in (PLUGIN / "pyproject.toml").read_text()
