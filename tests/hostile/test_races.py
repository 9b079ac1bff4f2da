"""Changes between a look and a use: names that move, folders that become links, keys."""

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile import live as lives
from hostile.live import TASK, Live, serving
from serving.conftest import write_adapter

from loralab.adapters import folder
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterFileError
from loralab.models.load import load as load_base
from loralab.serving.adapters import files as safe_read
from loralab.serving.adapters.store import Store
from loralab.serving.http.keys import Key, Keys

lively_llama_folder, adapters = lives.lively_llama_folder, lives.adapters
SECRET = "a key that must not be seen"
WORDS = ["good film", "bad film"]


@pytest.fixture(scope="module")
def live(lively_llama_folder: Path, adapters: Path) -> Iterator[Live]:
    with serving(lively_llama_folder, adapters) as found:
        yield found


# -- names that move while a request is read -----------------------------------------------------

ASKED: list[tuple[str, dict[str, Any], str]] = [
    (
        "/v1/completions",
        {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 6, "temperature": 0, "ignore_eos": True},
        "choices",
    ),
    ("/v1/completions", {"prompt": "good film", "max_tokens": 6, "temperature": 0, "ignore_eos": True}, "choices"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "good film"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True},
        "choices",
    ),
    ("/v1/classify", {"input": WORDS}, "data"),
]


@pytest.mark.parametrize(("path", "body", "part"), ASKED)
def test_the_digest_is_that_of_the_weights_that_answered(
    path: str, body: dict[str, Any], part: str, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(model: str) -> tuple[Any, str, str]:
        response = httpx.post(live.where + path, json={"model": model, **body}, timeout=20)
        assert response.status_code == 200, response.text
        found = response.json()
        return found[part], response.headers["x-loralab-digest"], found["adapter"]["digest"]

    alone = {live.engine.store.entry(f"v{n}").digest: ask(f"v{n}")[0] for n in range(4)}
    store = live.engine.store
    store.load("moving", "v0")
    plain, moves = store.entry, iter(range(1, 10**6))

    def entry(name: str) -> Any:
        """The name moves as soon as somebody has looked at it."""
        found = plain(name)
        if name == "moving":
            store.load("moving", f"v{next(moves) % 4}")
        return found

    monkeypatch.setattr(store, "entry", entry)
    seen = set()
    for _ in range(4):
        content, header, digest = ask("moving")
        assert content == alone[digest]
        assert header == digest
        seen.add(digest)
    assert len(seen) == 4


def test_labels_are_those_of_the_content_that_was_read(
    lively_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(lively_llama_folder), kind="causal-lm")
    write_adapter(base.model, LoRA(rank=1), tmp_path / "a", 1, task=TASK)
    other = {**TASK, "labels": ["awful", "great"]}

    def load(stored: Any) -> str:
        """While it is brought into memory, somebody writes another one."""
        write_adapter(base.model, LoRA(rank=2), tmp_path / "b", 2, task=other)
        return str(stored.digest)

    store = Store(tmp_path, load)
    plain = store._acquired

    def acquired(digest: str, read: Any = None) -> Any:
        held = plain(digest, read)
        if read is not None:
            shutil.rmtree(tmp_path / "a")
            shutil.copytree(tmp_path / "b", tmp_path / "a")
        return held

    monkeypatch.setattr(store, "_acquired", acquired)
    found = store.load("x", "a")
    assert found.labels == ("good", "bad")
    assert found.digest == store.entry("x").digest


# -- folders that become links -------------------------------------------------------------------


@pytest.fixture
def outside(adapters: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A store with one adapter, and one that lies outside of it."""
    shutil.copytree(adapters / "v0", tmp_path / "store" / "a")
    shutil.copytree(adapters / "v3", tmp_path / "outside")
    return tmp_path / "store", tmp_path / "outside"


def to_link(place: Path, target: Path) -> None:
    """Move a folder away and leave a link in its place."""
    place.rename(place.with_name("was-" + place.name))
    place.symlink_to(target)


@pytest.mark.parametrize("name", ["", folder.CONFIG, folder.TENSORS, folder.RECORD])
def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(
    name: str, outside: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, foreign = outside
    plain, swapped = safe_read._walked, []

    def walked(*given: Any) -> int:
        """The links have been looked up by now; here they change."""
        if not swapped:
            swapped.append(True)
            to_link(root / "a" / name if name else root / "a", foreign / name)
        return plain(*given)

    seen: list[str] = []
    store = Store(root, lambda stored: seen.append(stored.digest))
    before = store.entry("a").digest
    monkeypatch.setattr(safe_read, "_walked", walked)
    with contextlib.suppress(AdapterFileError):
        store.load("x", "a")
    assert swapped
    assert set(seen) <= {before}
    with pytest.raises(AdapterFileError):
        store.load("y", "a")


def test_a_folder_that_is_swapped_for_a_link_again_and_again_never_leads_out(outside: tuple[Path, Path]) -> None:
    root, foreign = outside
    own = folder.read(root / "a").digest
    (root / "link").symlink_to(foreign)
    over, seen = threading.Event(), set()

    def swap() -> None:
        while not over.is_set():
            (root / "a").rename(root / "b")
            (root / "link").rename(root / "a")
            (root / "a").rename(root / "link")
            (root / "b").rename(root / "a")

    store = Store(root, lambda stored: seen.add(stored.digest))
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(150):
            with contextlib.suppress(AdapterFileError):
                store.load(f"n{number}", "a")
    finally:
        over.set()
        thread.join()
    assert seen <= {own}


def test_a_pipe_in_the_place_of_a_file_holds_up_nobody(outside: tuple[Path, Path]) -> None:
    root, _ = outside
    store = Store(root, lambda stored: stored.digest)
    (root / "a" / folder.TENSORS).unlink()
    os.mkfifo(root / "a" / folder.TENSORS)
    with pytest.raises(AdapterFileError) as error:
        store.load("x", "a")
    assert (error.value.code, error.value.field) == ("not_a_file", "path")


# -- keys ----------------------------------------------------------------------------------------


def test_a_key_is_compared_in_constant_time_and_never_shown(
    lively_llama_folder: Path,
    adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    keys = Keys([Key(name=n, sha256=hashlib.sha256(SECRET.encode()).digest()) for n in ("a", "b")])
    compared: list[int] = []
    import hmac

    plain: Callable[[bytes, bytes], bool] = hmac.compare_digest
    monkeypatch.setattr(
        "loralab.serving.http.keys.hmac.compare_digest", lambda one, two: compared.append(len(one)) or plain(one, two)
    )
    caplog.set_level(logging.DEBUG)
    said = []
    with serving(lively_llama_folder, adapters, keys=keys) as live:
        for given in (SECRET, SECRET[:-1], SECRET + "\xff", "x", "Bearer"):
            compared.clear()
            head = {"Authorization": f"Bearer {given}".encode("latin-1")}
            for path in ("/v1/models", "/store", "/metrics", "/v1/models/none"):
                said.append(httpx.get(live.where + path, headers=head).text)
            assert compared == [32] * 8  # every key each time, whichever it is
        bad = {"Authorization": SECRET}
        said.append(httpx.post(live.where + "/v1/completions", headers=bad, content=b"{").text)
    out, err = capfd.readouterr()
    for text in (*said, out, err, caplog.text):
        assert SECRET not in text
