"""The short names: found without importing anybody's package."""

import importlib
import sys
from pathlib import Path

import pytest

from loralab.models.catalog import MODELS, in_package, listing

BROKEN = "raise RuntimeError('this package must not be imported')"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file beside the code of a package, which fails."""
    (tmp_path / "assets_of_mine").mkdir()
    (tmp_path / "assets_of_mine" / "__init__.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "assets_of_mine" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path / "assets_of_mine" / "model.gguf"


def test_a_package_is_found_and_not_imported(file: Path) -> None:
    locate = in_package("assets_of_mine", "model.gguf")
    assert locate() == file
    assert "assets_of_mine" not in sys.modules
    file.unlink()
    assert locate() is None
    assert in_package("no_package_at_all", "model.gguf")() is None


def test_the_listing_says_what_is_here_and_how_to_get_the_rest() -> None:
    rows = {row["name"]: row for row in listing()}
    assert list(rows) == list(MODELS)
    assert list(rows)[:3] == ["smollm2-135m", "minilm-l6", "dinov2-s"]
    for name, row in rows.items():
        assert row["present"] == (MODELS[name].locate() is not None)
        assert row["get"] == MODELS[name].get
        assert row["get"] == f"loralab assets install {name}"
