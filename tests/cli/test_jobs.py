"""train --jobs, as a user runs it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loralab.cli import run
from loralab.cli.jobs import JobLines
from loralab.errors import CertificateError, ConfigError
from loralab.training.jobs import read_jobs

JOBS = """
model = "{model}"
data = "{data}"
output_dir = "{place}"
rank = 2
max_steps = 4
batch_size = 4
precision = "fp32"

[[job]]
name = "first"
learning_rate = 0.01

[[job]]
name = "second"
method = "pissa"
seed = 3
max_steps = 2

[[job]]
name = "third"
rank = 3
"""


@pytest.fixture
def file(tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> Path:
    text = JOBS.format(model=tiny_llama_folder, data=sums_file, place=tmp_path / "runs")
    found = tmp_path / "jobs.toml"
    found.write_text(text)
    return found


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)["jobs"]


def test_each_job_is_a_run_of_its_own(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--jobs", str(file), "--json"]) == 0
    jobs = printed(capsys)
    assert [(job["name"], job["steps"]) for job in jobs] == [("first", 4), ("second", 2), ("third", 4)]
    assert all(job["certificate"]["passed"] for job in jobs)
    config = tomllib.loads((tmp_path / "runs" / "second" / "config.toml").read_text())
    assert (config["init"], config["seed"], config["rank"]) == ("pissa", 3, 2)
    assert run(["verify", str(tmp_path / "runs" / "third"), "--json"]) == 0
    capsys.readouterr()
    # its config.toml repeats it, by itself
    stored = tmp_path / "runs" / "first" / "config.toml"
    assert run(["train", "--config", str(stored), "--output-dir", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["validation"]["loss"] == pytest.approx(
        jobs[0]["validation"]["loss"], rel=1e-4
    )
    assert run(["train", "--jobs", str(file), "--json"]) == 2
    assert "job 'first': " in capsys.readouterr().err
    assert run(["train", "--jobs", str(file), "--resume", "--json"]) == 0
    assert [job["validation"] for job in printed(capsys)] == [job["validation"] for job in jobs]


def test_what_is_typed_overrides_what_is_common(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "others"
    assert run(["train", "--jobs", str(file), "--output-dir", str(place), "--max-steps", "3", "--dropout", "0.1"]) == 0
    said = capsys.readouterr()
    assert "first: step 3/3" in said.err
    assert "second: step 2/2" in said.err  # its own field is above both
    assert "first: end: saved in" in said.err
    assert "early" not in said.out
    assert str(place / "third") in said.out.replace("\n", "")
    config = tomllib.loads((place / "third" / "config.toml").read_text())
    assert (config["rank"], config["dropout"], config["max_steps"]) == (3, 0.1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learning_rate = 0.01", "lerning_rate = 1"), "job 'first': unknown field .*learning_ra"),
        (("seed = 3", "width = 3"), "job 'second': --width is not an option of lora"),
        (("rank = 3", "rank = 0"), "job 'third': .*rank"),
        (("rank = 3", 'data = "no.csv"'), "job 'third': .*no.csv"),
        (("rank = 3", 'model = "else"'), "model of 'first' is .* of 'third' 'else'"),
        (('name = "third"', 'name = "First"'), "names of jobs must differ"),
        (('name = "third"', 'name = "a/b"'), "job 'a/b': a name is made of letters"),
        (('name = "third"', ""), "job 3 has no name"),
        (("rank = 3", 'output_dir = "x"'), "job 'third': output_dir is common"),
        (("max_steps = 4", "max_step = 4"), "unknown field 'max_step'; did you mean max_steps"),
        (("[[job]]", "[[jobs]]"), "has no job"),
        (("rank = 2", "rank"), "is not TOML"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    file: Path, tmp_path: Path, change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    file.write_text(file.read_text().replace(*change))
    assert run(["train", "--jobs", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()


def test_a_file_and_a_place_are_needed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--jobs", str(tmp_path / "none.toml")]) == 2
    assert run(["train", "--jobs", str(file), "--config", str(file)]) == 2
    assert "one of --config and --jobs" in capsys.readouterr().err
    lines = [line for line in file.read_text().splitlines() if not line.startswith("output_dir")]
    file.write_text("\n".join(lines))
    assert run(["train", "--jobs", str(file)]) == 2
    assert "--output-dir" in capsys.readouterr().err


def test_a_job_that_fails_is_told_at_the_end_and_the_others_are_saved(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.training import run as run_module

    certify = run_module.certify

    def doubting(folder: Path, *given: Any, **options: Any) -> Any:
        if folder.name == "third":
            raise CertificateError("it is not the same")
        return certify(folder, *given, **options)

    monkeypatch.setattr(run_module, "certify", doubting)
    text = file.read_text().replace("learning_rate = 0.01", "learning_rate = 1e38\nwarmup = 0.0")
    file.write_text(text)
    assert run(["train", "--jobs", str(file), "--json"]) == 1
    said = capsys.readouterr()
    first, second, third = json.loads(said.out)["jobs"]
    assert "job 'first': step" in first["error"]
    assert second["certificate"]["passed"]
    assert third["error"] == "job 'third': it is not the same"
    assert said.err.count("error: job") == 2
    assert (tmp_path / "runs" / "third" / "adapter_model.safetensors").is_file()


def test_a_jobs_file_is_two_layers(tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text('rank = 2\noutput_dir = "x"\n[[job]]\nname = "a"\nrank = 3\n')
    assert read_jobs(file, {"rank"}) == ({"rank": 2, "output_dir": "x"}, {"a": {"rank": 3}})
    with pytest.raises(ConfigError) as error:
        read_jobs(file, {"alpha"})
    assert (error.value.code, error.value.field) == ("unknown_field", "rank")


def test_bars_stand_below_each_other_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    step = {"kind": "step", "step": 1, "steps": 2, "loss": 1.0, "tokens_per_second": 9.0, "seconds_left": 3.0}
    with JobLines(2) as lines:
        for name in ("a", "b", "a"):
            lines({**step, "job": name})
        assert len(lines._tasks) == 2
