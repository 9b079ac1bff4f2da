"""The commands, run as a user runs them: exit codes, one line an error, JSON."""

import inspect
import json
import shlex
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import loralab
from loralab.artefacts.engines import Incompatibility, Verdict
from loralab.cli import _as_interrupt, _ended, _thread_ended, artefacts, load_commands, run
from loralab.cli.options import pairs
from loralab.errors import ConfigError
from loralab.studies.fields import from_toml


@pytest.fixture(scope="module")
def run_folder(tiny_llama_folder: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run for all tests."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert run(arguments(tiny_llama_folder, sums_file, output)) == 0
    return output


@pytest.fixture
def trained(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(run_folder, tmp_path / "run")


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output-dir",
        str(output),
        "--max-steps",
        "4",
        "--batch-size",
        "4",
        "--rank",
        "2",
        "--quiet",
        *more,
    ]


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON document on standard output."""
    return json.loads(capsys.readouterr().out)


def test_every_command_on_a_run(
    trained: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert (
        run(
            [
                "evaluate",
                "--data",
                str(sums_file),
                "--adapter",
                str(trained),
                "--json",
                "--predictions",
                str(tmp_path / "p.jsonl"),
            ]
        )
        == 0
    )
    assert printed(capsys)["metrics"]["loss"] > 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) > 1
    assert run(["generate", "good film", "--adapter", str(trained), "--max-new-tokens", "3", "--json"]) == 0
    assert set(printed(capsys)[0]["answers"]) == {"base", str(trained)}
    assert run(["merge", str(trained), str(tmp_path / "m"), "--json"]) == 0
    assert printed(capsys)["passed"]
    assert run(["export", str(trained), str(tmp_path / "p"), "--to", "peft", "--json"]) == 0
    assert printed(capsys)["passed"]
    for place in (trained, tmp_path / "m", tmp_path / "p"):
        assert run(["verify", str(place), "--json"]) == 0
        assert printed(capsys)["passed"]
    assert run(["inspect", str(trained), "--json"]) == 0
    assert printed(capsys)["ranks"] == [2]
    assert run(["inspect", str(trained), str(tmp_path / "p"), "--json"]) == 0
    assert all(row["overlap"] == pytest.approx(1, abs=1e-3) for row in printed(capsys))
    for command in (["inspect", str(trained)], ["verify", str(trained)]):
        assert run(command) == 0  # as tables


def test_what_can_be_done_next_can_be_typed(
    tiny_llama_folder: Path,
    sums_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "it's $HOME; a run"
    assert run(arguments(tiny_llama_folder, sums_file, output)) == 0
    lines = capsys.readouterr().out.split("next:\n")[1].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [command[1] for command in commands] == ["evaluate", "generate", "merge"]
    assert all(str(output) in command for command in commands)
    assert commands[2][3] == f"{output}-merged"
    rows: list[tuple[str, str]] = []
    monkeypatch.setattr("loralab.cli.artefacts.print_table", lambda _, found: rows.extend(found))
    verdict = Verdict(
        target="vllm", obstacles=(Incompatibility(what="x", remedy="export"), Incompatibility(what="y", remedy="merge"))
    )
    artefacts._show_verdict(output, verdict)
    assert shlex.split(rows[1][1])[2] == shlex.split(rows[2][1])[2] == str(output)


def test_an_evaluation_says_which_rows_it_scored(
    trained: Path, tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "good film 7", "completion": "bad"}\n' * 5)
    capsys.readouterr()

    def scored(*options: str) -> tuple[int, str]:
        assert run(["evaluate", *options, "--json"]) == 0
        found = printed(capsys)
        assert run(["evaluate", *options]) == 0
        assert str(found["rows"]) in capsys.readouterr().out
        return found["rows"], found["split"]

    adapter = ["--adapter", str(trained)]
    assert scored("--data", str(sums_file), *adapter) == (6, "test")
    assert scored("--data", str(sums_file), *adapter, "--split", "train") == (48, "train")
    assert scored("--data", str(other), *adapter) == (5, "all")
    assert scored("--data", str(other), *adapter, "--limit", "2") == (2, "all")
    model = ["--model", str(tiny_llama_folder)]
    assert scored("--data", str(sums_file), *model) == (6, "test")
    assert scored("--data", str(sums_file), *model, "--split", "all") == (60, "all")


def test_plan_and_listings(tiny_llama_folder: Path, sums_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", str(tiny_llama_folder), "--data", str(sums_file), "--json"]) == 0
    assert printed(capsys)["trainable"] > 0
    for command in ("models", "tasks"):
        assert run([command, "--json"]) == 0
        assert all("present" in row for row in printed(capsys))
        assert run([command]) == 0
        capsys.readouterr()


def test_the_configuration_of_a_run_repeats_it(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    config = str(trained / "config.toml")
    assert run(["train", "--config", config, "--output-dir", str(again), "--quiet"]) == 0
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (trained / name).read_bytes()
    assert run(["train", "--config", config, "--output-dir", str(tmp_path / "other"), "--quiet", "--rank", "3"]) == 0
    assert (tmp_path / "other" / name).read_bytes() != (trained / name).read_bytes()


def test_flags_become_fields(
    tiny_gpt2_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    more = [
        "--target-modules",
        "c_attn,c_fc",
        "--rank-pattern",
        "c_fc=3",
        "--layers",
        "0,1",
        "--no-by-length",
        "--modules-to-save",
        "lm_head",
    ]
    assert run(arguments(tiny_gpt2_folder, sums_file, output, *more)) == 0
    record = json.loads((output / "loralab.json").read_text())
    method, training = record["method"], record["training"]
    assert method["target_modules"] == ["c_attn", "c_fc"]
    assert method["rank_pattern"] == {"c_fc": 3}
    assert method["layers"] == [0, 1]
    assert method["modules_to_save"] == ["lm_head"]
    assert training["by_length"] is False


BAD = [
    (["train", "--model", "smolm2-135m", "--data", "{data}"], "did you mean smollm2-135m"),
    (["train", "--data", "movie-reviws"], "did you mean movie-reviews"),
    (["train", "--data", "{empty}"], "line 1"),
    (["train", "--data", "{broken}"], "line 2"),
    (["train", "--data", "{columns}"], "--map"),
    (["train"], "--data"),
    (["train", "--data", "{data}", "--rank", "0"], "rank"),
    (["train", "--data", "{data}", "--rank", "many"], "--rank"),
    (["train", "--data", "{data}", "--rnak", "3"], "--rank"),
    (["train", "--data", "{data}", "--target-modules", "q_porj"], "did you mean q_proj"),
    (["train", "--data", "{data}", "--max-length", "2"], "--max-length"),
    (["train", "--data", "{data}", "--schedule", "linaer"], "did you mean linear"),
    (["train", "--data", "{data}", "--method", "lroa"], "did you mean lora"),
    (["train", "--data", "{data}", "--rank-pattern", "q_proj"], "name=value"),
    (["train", "--data", "{data}", "--layers", "a"], "--layers"),
    (["train", "--config", "{broken}"], "not TOML"),
    (["train", "--config", "{keys}"], "did you mean rank"),
    (["train", "--data", "{data}", "--map", "text=nothing"], "nothing"),
    (["evaluate", "--data", "{data}", "--adapter", "nowhere"], "nowhere"),
    (["evaluate", "--data", "{data}", "--split", "tset"], "did you mean test"),
    (["generate", "hello", "--adapter", "nowhere"], "nowhere"),
    (["merge", "nowhere", "out"], "nowhere"),
    (["export", "nowhere", "out", "--to", "pfet"], "did you mean peft"),
    (["verify", "nowhere"], "loralab.json"),
    (["inspect", "nowhere"], "nowhere"),
    (["verfy"], "verify"),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    command: list[str],
    message: str,
    tiny_llama_folder: Path,
    sums_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "empty": ("empty.jsonl", ""),
        "broken": ("broken.jsonl", '{"text": "a"}\n{"text": \n'),
        "columns": ("columns.csv", "review,stars\na,b\n"),
        "keys": ("keys.toml", "rnak = 3\n"),
    }
    places = {"data": str(sums_file)}
    for name, (file, content) in files.items():
        (tmp_path / file).write_text(content)
        places[name] = str(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    filled = [part.format(**places) for part in command]
    if command[0] == "train":
        filled += ["--output-dir", "out"]
        filled += [] if "--model" in filled else ["--model", str(tiny_llama_folder)]
    assert run(filled) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("error: ")
    assert message in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_that_fails_is_exit_1(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    capsys.readouterr()
    assert run(["verify", str(trained)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_in_the_way_says_resume(
    trained: Path, tiny_llama_folder: Path, sums_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(arguments(tiny_llama_folder, sums_file, trained)) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(arguments(tiny_llama_folder, sums_file, trained, "--resume")) == 0


def test_an_error_of_ours_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("loralab.models.catalog.listing", broken)
    assert run(["models"]) == 1
    assert capsys.readouterr().err.startswith("internal error: RuntimeError: two lines")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["train"], ["plan"], ["evaluate"], ["generate"], ["merge"], ["inspect"]):
        assert run([*command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("loralab ")


def test_pairs_and_configuration_files(tmp_path: Path) -> None:
    assert pairs("a=1, b=2", "rank_pattern", int) == {"a": 1, "b": 2}
    with pytest.raises(ConfigError) as error:
        pairs("a=x", "rank_pattern", int)
    assert (error.value.code, error.value.field) == ("not_pairs", "rank_pattern")
    with pytest.raises(ConfigError) as error:
        from_toml(tmp_path / "none.toml", set())
    assert error.value.code == "cannot_read"


@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_is_ctrl_c(ignored: bool) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        if ignored:  # as a shell starts what stands before "&"
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt):
            _as_interrupt(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_ran_out_is_said_so(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ended(error, []) == 1
    assert capsys.readouterr().err.startswith("error: memory ran out")


def test_a_thread_that_cannot_write_adds_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(28, "No space left on device"), ValueError("another")):
        _thread_ended(threading.ExceptHookArgs((type(error), error, None, None)))
    said = capsys.readouterr().err
    assert "No space" not in said
    assert "ValueError: another" in said


def test_every_command_is_a_function_of_the_same_word() -> None:
    lists, shows = {"models", "tasks", "assets"}, {"demo"}  # packages in Python; and calls of the others, on a screen
    words = set(load_commands().commands) - lists - shows
    assert words >= {
        "train",
        "plan",
        "evaluate",
        "generate",
        "merge",
        "export",
        "check",
        "verify",
        "inspect",
        "study",
        "report",
        "recommend",
        "serve",
        "card",
        "push",
    }
    for word in words:
        function = getattr(loralab, word)
        assert inspect.isfunction(function) and function.__name__ == word


@pytest.mark.parametrize(
    ("typed", "resumes"),
    [(["train"], True), (["study", "rank"], True), (["audit", "train"], False), (["evaluate"], False), ([], False)],
)
def test_an_interrupted_command_says_resume_where_it_can(
    typed: list[str], resumes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _ended(KeyboardInterrupt(), typed) == 130
    assert ("--resume" in capsys.readouterr().err) == resumes
