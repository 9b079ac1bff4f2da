"""Commands on whole runs."""

from pathlib import Path

import pytest

from loralab.cli import working


@pytest.fixture(scope="session")
def tiny_llama_folder(flat_llama_folder: Path) -> Path:
    """Return the Llama of one layer."""
    return flat_llama_folder


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave standard error to what is tested, however slow the machine is."""
    monkeypatch.setattr(working, "PATIENCE", 3600.0)
