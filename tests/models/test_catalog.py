"""The short names: found without importing anybody's package."""

import importlib
import sys
from pathlib import Path

import pytest

from loralab.models.catalog import MODELS, Packaged, how_to_get, listing, locate

BROKEN = "raise RuntimeError('this package must not be imported')"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """A package whose own code fails, with a file beside it."""
    (tmp_path / "assets_of_mine").mkdir()
    (tmp_path / "assets_of_mine" / "__init__.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "assets_of_mine" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return Packaged(
        name="mine",
        package="assets-of-mine==1.0",
        module="assets_of_mine",
        file="model.gguf",
        kind="causal-lm",
        parameters=1,
        licence="MIT",
        description="",
    )


def test_a_package_is_found_and_not_imported(packaged: Packaged) -> None:
    found = locate(packaged)
    assert found is not None
    assert found.name == "model.gguf"
    assert "assets_of_mine" not in sys.modules


def test_a_package_without_the_file_counts_as_absent(packaged: Packaged) -> None:
    found = locate(packaged)
    assert found is not None
    found.unlink()
    assert locate(packaged) is None


def test_the_listing_says_what_is_here_and_how_to_get_the_rest() -> None:
    rows = {row["name"]: row for row in listing()}
    assert rows.keys() == MODELS.keys()
    for name, row in rows.items():
        assert row["present"] == (locate(MODELS[name]) is not None)
        assert row["get"] == how_to_get(MODELS[name])
        assert "--no-deps" in row["get"]
        assert "==" in row["package"]
