"""The documentation runs, and names what exists."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import torch
from outside import registered
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab import errors
from loralab.adapters.methods import INITS, SCALINGS
from loralab.adapters.registry import built_in
from loralab.cli import load_commands
from loralab.studies.catalog import STUDIES

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-TW.md")
RUN = (*READMES, "docs/python.md", "docs/trainer.md", "docs/index.md", "docs/how-to/adapt.md")


def commands() -> list[str]:
    return list(load_commands().commands)


@pytest.mark.parametrize("document", RUN)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # of Trainer, on a CPU
def test_the_python_of_a_document_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path
) -> None:
    """Its blocks one after the other, with the model and the rows that it speaks of."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    ids = torch.arange(36).view(4, 9)
    words = ["good", "bad", "fine", "poor"]
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        "tokenizer": AutoTokenizer.from_pretrained(tiny_llama_folder),
        "batch": {"input_ids": ids, "labels": ids},
        "rows": {"input_ids": ids},
        "examples": [{"prompt": f"{n} {words[n % 4]}", "completion": words[n % 4]} for n in range(40)],
    }
    for block in blocks:
        exec(compile(block, document, "exec"), names)


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_read_in_minutes(readme: str) -> None:
    lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert [line for line in lines if len(line) > 160] == []


def test_the_method_of_the_documents_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/write-a-method.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(found) == 1
    with registered():
        exec(compile(found[0], "write-a-method.md", "exec"), {"__name__": "written"})


@pytest.mark.parametrize("readme", READMES)
def test_every_command_is_in_the_readme(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert [name for name in commands() if f"loralab {name}" not in text] == []
    assert "make demo" in text
    assert "make test" in text


def test_every_field_of_a_method_is_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method in (spec.config for spec in built_in().values()):
        assert [f.name for f in dataclasses.fields(method) if f.name not in text] == []


def test_every_study_is_in_the_documents() -> None:
    for document in (*READMES, "docs/questions.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert [name for name in STUDIES if f"`{name}`" not in text] == [], document


def test_the_readmes_have_no_blanks() -> None:
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert not re.search(r"^[A-Z_]{6,}$", text, re.M), readme


def test_the_changelog_names_starts_and_scalings() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in INITS if name not in text] == []
    assert len(SCALINGS) == 3


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == loralab.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", changes, re.M)
    assert versions[0] == loralab.__version__


def test_every_public_name_can_be_imported() -> None:
    for name in loralab.__all__:
        assert getattr(loralab, name) is not None


def test_the_error_tree_is_drawn_whole() -> None:
    drawn = errors.__doc__ or ""
    kinds = [n for n, v in vars(errors).items() if isinstance(v, type) and n.endswith("Error")]
    assert [name for name in kinds if name not in drawn] == []
