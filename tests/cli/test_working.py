"""What a long command says of itself before its first bar."""

import time

import pytest

from loralab.cli import working
from loralab.cli.progress import Bar


def test_a_long_command_says_one_line_and_a_short_one_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with working.working("loading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(working, "PATIENCE", 0.0)
    with working.working("loading"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "loading ...\n"
    with working.working("loading", quiet=True):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_an_error_comes_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), working.working("loading"):
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""


def test_a_bar_is_silent_about_its_opening_from_the_first_event_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(working, "PATIENCE", 0.2)
    with Bar(opening="loading") as bar:
        bar({"kind": "note", "text": "all is well"})
        time.sleep(0.3)
    assert "loading" not in capsys.readouterr().err
