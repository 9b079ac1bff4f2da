"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest

from loralab import atomic
from loralab.errors import OutputError


def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.txt"
    atomic.write_file(file, "old")
    atomic.write_file(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.txt"
    atomic.write_file(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as error:
        atomic.write_file(file, "new")
    assert (error.value.code, error.value.field) == ("cannot_write", "output")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_fails_half_way_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "out") as place:
        (place / "a").write_text("x")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_also_over_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic.new_folder(tmp_path / "out") as place:
        (place / "a").write_text("x")
        assert not (tmp_path / "out" / "a").exists()
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_what_stands_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError) as error, atomic.new_folder(tmp_path / "out"):
        pass
    assert (error.value.code, error.value.field) == ("output_exists", "output")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / f"out{atomic.PARTIAL}"
    left.mkdir()
    (left / "half").write_text("x")
    with atomic.new_folder(tmp_path / "out") as place:
        (place / "whole").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_folder_with_half_a_file_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    (tmp_path / f"config.toml{atomic.PARTIAL}").write_text("x")
    atomic.require_free(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError) as error:
        atomic.write_file(tmp_path / "file", "x")
    assert (error.value.code, error.value.field) == ("cannot_write", "output")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"LORALAB_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/loralab"), ({"HOME": "/c"}, "/c/.cache/loralab")],
)
def test_the_cache_is_where_the_user_wants_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORALAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert atomic.cache_folder() == Path(expected)


def test_what_a_library_in_rust_raises_names_the_place_too(tmp_path: Path) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputError) as error, atomic.new_folder(tmp_path / "out"):
        raise RuntimeError(said)
    assert (error.value.code, error.value.field) == ("cannot_write", "output")
    assert str(tmp_path / "out") in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic.new_folder(tmp_path / "out"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_a_folder_leaves_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "first").write_text("x")
    with monkeypatch.context() as patch:  # killed before the first file is gone
        patch.setattr("shutil.rmtree", lambda *given, **named: None)
        atomic.remove_folder(place)
    assert not place.exists()
    atomic.remove_folder(place)
    assert not list(tmp_path.iterdir())
