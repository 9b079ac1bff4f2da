"""`loralab demo`: the main job, on a tiny model."""

import json
from pathlib import Path

import pytest

from loralab.cli import run
from loralab.cli.demo import Demo
from loralab.errors import OutputError


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    file = tmp_path / "reviews.csv"
    words = {"good": ["good", "great", "fine"], "bad": ["bad", "poor", "awful"]}
    rows = [f"this film is {words[label][n % 3]} {n},{label}" for n in range(40) for label in words]
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return file


def test_the_main_job_ends_with_its_numbers(
    tiny_llama_folder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    result = Demo(str(tiny_llama_folder), str(reviews), output, steps=10, rows=6).run()
    assert json.loads((output / "demo.json").read_text(encoding="utf-8")) == result
    assert result["rows"] == 6 and result["steps"] == 10 and result["merge"]["passed"]
    assert result["good"] == (result["accuracy_adapted"] - result["accuracy_base"] >= 0.1)
    assert (output / "merged" / "model.safetensors").is_file()
    lines = capsys.readouterr().err.splitlines()
    assert [line[0] for line in lines if line[:1].isdigit() and line[1:2] == " "] == ["1", "2", "3", "4"]


def test_a_folder_of_something_else_is_not_written_anew(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").touch()
    with pytest.raises(OutputError) as error:
        Demo("model", "data", tmp_path, steps=1, rows=1).run()
    assert error.value.code == "output_exists"
    assert (tmp_path / "adapter" / "mine.txt").is_file()


def test_missing_assets_are_asked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loralab.cli import demo
    from loralab.packages import Offer, Package

    own = Package(name="tiny-model", version="1", sha256="a" * 64, size=1, licence="MIT")
    monkeypatch.setattr(demo, "known_offers", lambda: [Offer(package=own, names=(demo.MODEL,), present=False)])
    assert run(["demo", "--output-dir", str(tmp_path / "demo"), "--json"]) == 2
    assert not (tmp_path / "demo").exists()
