"""The notebooks name what exists, are kept without outputs, and run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loralab

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def code_of(notebook: Path) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells_of(notebook))


@each
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    assert [cell for cell in cells_of(notebook) if cell["outputs"] or cell["execution_count"] is not None] == []


@each
def test_what_a_notebook_names_of_loralab_exists(notebook: Path) -> None:
    names = set[str]()
    for node in ast.walk(ast.parse(code_of(notebook))):
        if isinstance(node, ast.ImportFrom) and node.module == "loralab":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "loralab":
            names.add(node.attr)
    assert names
    assert names - set(loralab.__all__) == set()


def test_every_notebook_is_in_the_documents() -> None:
    for document in ("README.md", "README.zh-TW.md", "docs/notebooks.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert "notebooks" in text
    text = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 6
    assert [file.name for file in NOTEBOOKS if file.name not in text] == []


@pytest.mark.slow
@each
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """In a process of its own, as its kernel is one."""
    script = tmp_path / f"{notebook.stem}.py"
    script.write_text(code_of(notebook), encoding="utf-8")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
