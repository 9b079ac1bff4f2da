"""A study goes on where it was, in one process at a time, and every trial stands alone."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked, Subprocess
from hostile.crash import Victim
from studies.conftest import setup_of
from studies.outcomes import results

from loralab.errors import ConfigError, OutputError
from loralab.studies import store
from loralab.studies.conduct import require_place
from loralab.studies.executor import Here
from loralab.studies.runner import BUDGET, session
from loralab.studies.study import DIVERGED, DONE, FAILED, MISSING, Arm, Record, Trial
from loralab.studies.trained import MEASURE, measured

TOML = """
model = "{model}"
data = "{data}"
steps = 6
batch_size = 8
precision = "fp32"
fixed_lr = true
test_rows = 20
seeds = 2
seeds_max = 2
method = "lora"
rank = [2, 4]
"""


@pytest.fixture
def own_study(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(TOML.format(model=tiny_bert_folder, data=noise_file), encoding="utf-8")
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loralab", *map(str, arguments)]


def start(*arguments: object) -> Forked:
    return Subprocess().Popen(command(*arguments), text=True, stderr=subprocess.PIPE)


def killed_at_random(own_study: Path, folder: Path, times: int, wait: float) -> None:
    for number in range(times):
        extra = ["--resume"] if (folder / store.STUDY).is_file() else []
        running = Victim(["study", own_study, "--output-dir", folder, *extra])
        time.sleep(wait + 0.7 * number)
        running.hit(signal.SIGKILL)
        running.end()


def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(own_study: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    Victim(["tasks", "--json"]).end()  # now everything is imported
    killed_at_random(own_study, killed, 2, 1.0)
    require_end(killed / store.LOG)
    extra = ["--resume"] if (killed / store.STUDY).is_file() else []
    for folder, more in ((killed, extra), (whole, [])):
        ended = Victim(["study", own_study, "--output-dir", folder, *more]).end()
        assert ended.code == 0, ended.said
    assert results(killed) == results(whole)
    assert len(results(whole)) == 5  # two arms with two seeds, and the untrained model
    for file in ("report.html", "report.md", "report.zh-TW.md", "results.parquet"):
        assert (whole / file).stat().st_size > 500


@pytest.mark.slow
def test_a_study_killed_ten_times(own_study: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed_at_random(own_study, killed, 10, 0.5)
    require_end(killed / store.LOG)
    extra = ["--resume"] if (killed / store.STUDY).is_file() else []
    for folder, more in ((killed, extra), (whole, [])):
        ended = Victim(["study", own_study, "--output-dir", folder, *more]).end()
        assert ended.code == 0, ended.said
    assert results(killed) == results(whole)


def test_two_studies_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    with store.locked(folder):
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), store.locked(folder):
            pass
        assert (folder / store.LOCK).exists()
        (folder / "kept").touch()
    with store.locked(folder):
        pass  # free again


def test_what_went_wrong_is_said_although_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OutputError, match="the first error"), store.locked(tmp_path / "study"):
        raise OutputError("the first error")


def test_a_finished_cell_is_never_run_again(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of("grid", tiny_bert_folder, noise_file, seeds=1)
    arm = Arm(name="r=2", fields={"rank": 2}, tuned=False)
    trial = Trial(measure="none:none", setup=setup, arm=arm, seed=0)
    store.write(store.place_of(tmp_path, trial), trial, Record(arm=arm, seed=0), 1.0)
    monkeypatch.setattr(Here, "run", None)
    with session(tmp_path) as own:
        assert own.obtain(trial).status == DONE  # a measure that does not exist was not asked


def test_what_does_not_fit_the_budget_is_left_out_and_said(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    setup = setup_of("grid", tiny_bert_folder, noise_file, seeds=1)
    trial = Trial(measure="none:none", setup=setup, arm=Arm(name="r=2"), seed=0)
    with session(tmp_path, budget=1e-6) as own:
        time.sleep(0.01)
        found = own.obtain(trial)
    assert (found.status, found.reason) == (MISSING, BUDGET)


def test_a_cell_that_dies_is_a_record_and_the_next_one_runs(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of("grid", tiny_bert_folder, noise_file, seeds=1)
    module = tmp_path / "dying.py"
    module.write_text(
        "import os, signal\nfrom loralab.studies.study import Record\n"
        "def killed(trial, folder, tell): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def broken(trial, folder, tell): raise ZeroDivisionError('an error of ours')\n"
        "def well(trial, folder, tell): return Record(arm=trial.arm, seed=trial.seed)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    with session(tmp_path / "study") as own:
        found = [
            own.obtain(Trial(measure=f"dying:{name}", setup=setup, arm=Arm(name=name), seed=0))
            for name in ("killed", "broken", "well")
        ]
    assert [record.status for record in found] == [FAILED, FAILED, DONE]
    assert "memory" in found[0].reason
    assert "ZeroDivisionError" in found[1].reason
    assert "an error of ours" in (tmp_path / "study" / "worker.log").read_text(encoding="utf-8")


def test_the_worker_ends_with_its_parent(tmp_path: Path, own_study: Path) -> None:
    running = start("study", own_study, "--output-dir", tmp_path / "study")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (trials := printing_to(tmp_path / "study" / store.LOG)):
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert trials
    require_end(tmp_path / "study" / store.LOG)


def require_end(log: Path) -> None:
    """Wait for what a killed study has started, which ends by itself."""
    time.sleep(0.2)  # what was just forked does not print to the log yet
    deadline = time.monotonic() + 10
    while printing_to(log):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printing_to(log: Path) -> list[int]:
    """Return the processes whose standard output is a file."""
    found = []
    for stream in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if stream.readlink() == log:
                found.append(int(stream.parts[2]))
    return found


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    setup = setup_of("rank", tiny_bert_folder, noise_file)
    store.add_plan(tmp_path, (setup, [Arm(name="r=2")], {}))
    other = setup_of("rank", tiny_bert_folder, noise_file, seeds=3)
    with pytest.raises(ConfigError, match="seeds was 2, now 3"):
        store.require_same(tmp_path, other)
    store.require_same(tmp_path, setup)


def test_the_plan_of_a_study_survives_its_file(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    setup = setup_of("rank", tiny_bert_folder, noise_file, values=("2", "4"))
    arms = [Arm(name="a", fields={"method": "lora", "target_modules": ["q", "v"]}), Arm(name="b")]
    store.add_plan(tmp_path, (setup, arms, {"b": "why"}))
    found, read_arms, invalid = store.plans(tmp_path)["rank"]
    assert found == setup
    assert read_arms == arms
    assert invalid == {"b": "why"}
    trials = [Trial(measure="m:f", setup=g, arm=a, seed=0).digest for g, a in ((setup, arms[0]), (found, read_arms[0]))]
    assert trials[0] == trials[1]


def test_numbers_that_are_not_finite_survive_as_absent(tmp_path: Path) -> None:
    arm = Arm(name="x")
    trial = Trial(measure="m:f", setup=setup_of("rank", tmp_path, tmp_path), arm=arm, seed=0)
    record = Record(arm=arm, seed=0, numbers={"a": float("nan"), "b": 1.0}, series={"l": [1.0, float("inf")]})
    store.write(store.place_of(tmp_path, trial), trial, record, 2.0)
    file = store.place_of(tmp_path, trial) / store.RECORD
    json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    found = store.read(tmp_path, trial)
    assert found is not None
    assert found.numbers == {"b": 1.0}
    assert found.series == {"l": [1.0, None]}
    assert found.seconds == 2.0


def test_ctrl_c_leaves_a_study_that_goes_on(tmp_path: Path, own_study: Path) -> None:
    folder = tmp_path / "study"
    running = start("study", own_study, "--output-dir", folder)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(folder.glob("runs/*")):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    if running.returncode != 0:  # it may have been done already
        assert running.returncode == 130
        assert "--resume" in said
    done = Victim(["study", own_study, "--output-dir", folder, "--resume"]).end()
    assert done.code == 0, done.said
    assert {entry.status for entry in results(folder).values()} == {DONE}


def test_a_run_that_ends_without_finite_numbers_is_a_result_of_its_own(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    fields = {"learning_rate": 1e30}
    setup = setup_of("grid", tiny_bert_folder, noise_file, seeds=1, fields=fields)
    trial = Trial(measure=MEASURE, setup=setup, arm=Arm(name="r=2", fields={"rank": 2}), seed=0)
    found = measured(trial, tmp_path / "cell", lambda event: None)
    assert found.status == DIVERGED
    assert "not finite" in found.reason
    other = Arm(name="x", fields={"rank": 2, "target_modules": ["nothing"]})
    missing = Trial(measure=MEASURE, setup=setup, arm=other, seed=0)
    assert measured(missing, tmp_path / "other", lambda event: None).status == FAILED


def test_what_a_study_left_that_was_killed_as_it_began_is_no_obstacle(tmp_path: Path) -> None:
    for name in (store.LOCK, store.LOG, f"{store.STUDY}.partial"):
        (tmp_path / name).touch()
    require_place(tmp_path, resume=False)
    (tmp_path / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        require_place(tmp_path, resume=False)


def test_the_commands_that_an_error_proposes_can_be_typed(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    with pytest.raises(OutputError) as error:
        store.plans(folder)
    assert shlex.split(str(error.value).split("start one: ")[1])[-1] == str(folder)
    folder.mkdir()
    (folder / store.STUDY).touch()
    with pytest.raises(OutputError) as error:
        require_place(folder, resume=False)
    assert f"loralab report {shlex.quote(str(folder))}, " in str(error.value)
