"""How far a command says that it is."""

import io
from collections.abc import Iterator

import pytest

from loralab.cli import progress
from loralab.cli.progress import Counts, Pace
from loralab.progress import counted, stages

Event = tuple[str, int, int]


def test_counts_rise_from_nothing_to_all() -> None:
    events: list[Event] = []
    rows = [[1, 2], [3], [4, 5]]
    found = [row for part in counted(rows, "rows", 5, lambda *event: events.append(event)) for row in part]
    assert found == [1, 2, 3, 4, 5]
    assert events == [("rows", 0, 5), ("rows", 2, 5), ("rows", 3, 5), ("rows", 5, 5)]


def test_a_stage_begins_where_those_before_it_end() -> None:
    events: list[Event] = []
    begin = stages({"load": 3, "ask": 1, "write": 2}, lambda *event: events.append(event))
    for stage in ("load", "ask", "write"):
        begin(stage)
    assert events == [("load", 0, 6), ("ask", 3, 6), ("write", 4, 6)]


def test_the_time_left_is_that_of_the_rest_at_the_same_pace() -> None:
    pace = Pace("rows", 2, 8, started=100.0, now=110.0)
    assert pace.left(110.0) == pytest.approx(30.0)
    assert pace.left(115.0) == pytest.approx(25.0)
    assert pace.left(200.0) == 0.0
    assert Pace("rows", 0, 8, started=100.0, now=100.0).left(110.0) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_plain_lines_come_every_few_seconds_and_begin_anew_with_new_work(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Counts() as counts:
        for done in range(101):
            counts("scoring", done, 100)
            clock[0] += 1.0
        counts("writing", 0, 100)
        clock[0] += 10.0
        counts("writing", 50, 100)
    lines = capsys.readouterr().err.splitlines()
    scored = [line for line in lines if "scoring" in line]
    assert len(scored) == progress.LINES
    assert scored[-1].split() == ["scoring", "100%", "0:00", "left"]
    assert lines[-1].split() == ["writing", "50%", "0:10", "left"]


def test_what_is_quick_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Counts() as counts:
        for done in range(11):
            counts("scoring", done, 10)
            clock[0] += 0.1
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_goes_away(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Counts() as counts:
        counts("scoring", 1, 4)
        clock[0] += 10.0
        counts("scoring", 2, 4)
    shown = terminal.getvalue()
    assert "50%" in shown
    assert shown.endswith("\x1b[2K")  # the line is cleared for what follows
