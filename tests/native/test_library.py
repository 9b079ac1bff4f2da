"""The compiled functions are optional, built once, and not built where they cannot be."""

from pathlib import Path

import pytest
import torch

from loralab.errors import ConfigError
from loralab.native import library as native


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))  # nothing here runs it
    monkeypatch.setattr(native, "kernels", native.functools.lru_cache(native.kernels.__wrapped__))


def libraries(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "loralab").rglob("*") if file.is_file()]


def test_it_is_built_once(tmp_path: Path) -> None:
    if native.kernels() is None:
        pytest.skip("no C compiler here")
    (library,) = libraries(tmp_path)
    written = library.stat().st_mtime_ns
    native.kernels.cache_clear()
    assert native.kernels() is not None
    assert libraries(tmp_path) == [library]
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize(("name", "value"), [("LORALAB_NATIVE", "off"), ("CC", "no-such-compiler"), ("CC", "false")])
def test_without_it_torch_does_the_work(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert native.kernels() is None
    assert libraries(tmp_path) == []


@pytest.mark.parametrize("word", ["0", "Off", "", "of"])
def test_a_word_that_is_neither_on_nor_off_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, word)
    with pytest.raises(ConfigError) as refused:
        native.kernels()
    assert (refused.value.code, refused.value.field) == ("wrong_value", native.SWITCH)


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert native.kernels() is None


def test_only_what_it_can_take_is_given_to_it() -> None:
    assert native.kernels_for(torch.zeros(1)) is None
    assert native.kernels_for(torch.zeros(1, dtype=torch.bfloat16, device="meta")) is None
