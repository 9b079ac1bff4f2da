"""Damaged and malicious files: read, or refused in one line that names the file; nothing else.

LORALAB_FUZZ is how many files each reader gets (else 60, or 10 where a file takes long), and
LORALAB_FUZZ_SEED another seed.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from contract_variants import VARIANTS
from hostile.readers import readers
from hostile.trial import MOST, Outcome, trial

COUNT = int(os.environ.get("LORALAB_FUZZ", "0"))
SEED = int(os.environ.get("LORALAB_FUZZ_SEED", "0"))
MANY = 10_000
NAMES = (
    *(f"adapter {name}" for name in VARIANTS),
    "checkpoint",
    "metrics.jsonl",
    "certificate.safetensors",
    "config.toml",
    "jobs.toml",
    "keys.toml",
    "store",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    "pictures",
    "idx.gz",
    "model folder",
    "gguf",
    "chat template",
    "study",
)
SLOW_ONES = ("adapter", "checkpoint", "model", "gguf", "study", "store")


@pytest.fixture(params=NAMES)
def outcome_of(
    request: pytest.FixtureRequest, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A function from a number of files and a seed to the outcome of one reader."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    reader = next(r for r in readers(tiny_llama_folder, tokenizer) if r.name == request.param)

    def outcome(count: int, seed: int) -> Outcome:
        found = trial(reader, tmp_path, count, seed)
        print(
            f"\n{reader.name}: {found.inputs} files, {found.errors} refused, {found.loads} "
            f"read, {len(found.failures)} failures, {found.peak / 2**20:.0f} MB"
        )
        return found

    outcome.name = reader.name  # type: ignore[attr-defined]
    return outcome


def test_all_readers_are_here(tiny_llama_folder: Path) -> None:
    class Tokenizer:
        chat_template = ""

    assert tuple(r.name for r in readers(tiny_llama_folder, Tokenizer())) == NAMES


def test_a_file_is_read_or_refused_in_one_line(outcome_of: Any) -> None:
    usual = 10 if outcome_of.name.startswith(SLOW_ONES) else 60
    found = outcome_of(COUNT or usual, SEED)
    assert found.failures == []
    assert found.peak < MOST


@pytest.mark.slow
def test_ten_thousand_files_are_read_or_refused(outcome_of: Any) -> None:
    found = outcome_of(MANY, SEED + 1)
    assert found.failures == []
    assert found.peak < MOST
