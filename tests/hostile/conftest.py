"""Attacks on runs, files and servers."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama_folder(flat_llama_folder: Path) -> Path:
    """Return the Llama of one layer."""
    return flat_llama_folder
