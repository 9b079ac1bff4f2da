"""The page, as it is used: turns, differences, what is not asked, what is copied; at two widths."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import served
from serving.browser import browsing
from serving.fakes import FakeEngine, FakeEntry, FakeStore, digest_of
from serving.served import Serve

from loralab.serving.page.routes import FOLDER

engine, serve = served.engine, served.serve
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NODE = shutil.which("node")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
node = pytest.mark.skipif(NODE is None, reason="no node here")
DONE = "document.querySelector('#stop').disabled && document.querySelectorAll('.answer dl:not([hidden])').length > 0"
READY = "document.querySelectorAll('#chips .chip').length > 0"
TEXTS = "[...document.querySelectorAll('.answer')].map(a => [...a.querySelectorAll('.text')].map(t => t.textContent))"


def answer_of(module: str, expression: str) -> Any:
    """Return the value of an expression over one of the page's modules, as node computes it."""
    assert NODE is not None
    code = f"""globalThis.sessionStorage = {{ getItem: () => "k", setItem: () => 0 }};
    globalThis.location = {{ href: "http://127.0.0.1:8000/?lang=en" }};
    const m = await import({json.dumps((FOLDER / module).as_uri())});
    console.log(JSON.stringify({expression}));"""
    command = [NODE, "--no-warnings", "--input-type=module", "-e", code]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


@node
@pytest.mark.parametrize(
    ("text", "base", "marked", "share"),
    [
        ("a b c", "a b c", [], 1),
        ("a x y c", "a b c", ["x y"], 0.5),  # the space between two marked words is marked too
        ("good film", "", ["good film"], 0),
        ("", "a", [], 1),
        ("很好的電影", "很差的電影", ["好"], 0.8),
    ],
)
def test_words_that_the_base_lacks_are_marked(text: str, base: str, marked: list[str], share: float) -> None:
    found = answer_of("differences.js", f"m.differences({json.dumps(text)}, {json.dumps(base)})")
    assert "".join(part["text"] for part in found["parts"]) == text
    assert [part["text"] for part in found["parts"] if not part["same"]] == marked
    assert found["share"] == pytest.approx(share)


@node
def test_the_command_that_is_copied_asks_the_same_and_holds_no_key() -> None:
    body = {"model": "it's", "messages": [{"role": "user", "content": "a 'b' $HOME `c`\n"}], "seed": 3}
    command = answer_of("server.js", f"m.curl('v1/chat/completions', {json.dumps({**body, 'stream': True})})")
    shell = "curl() { printf '%s\\0' \"$@\"; }; LORALAB_KEY=secret; " + command
    words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.split("\0")
    assert words[0] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[words.index("-d") + 1]) == body
    assert "Authorization: Bearer secret" in words
    assert "secret" not in command


@browser
def test_a_conversation_goes_on_in_every_column(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    where = serve(engine) + "/?lang=en&models=tiny,sst&max_tokens=3&seed=7&system=be+brief"
    with browsing(str(CHROMIUM), where, tmp_path) as page:
        page.until(READY)
        assert page.value("document.querySelector('#run').disabled")  # nothing is asked yet
        page.type("#prompt", "good film")
        page.click("#run")
        page.until(DONE)
        first = [prompt for prompt, _ in engine.asked]
        page.type("#prompt", "and now")
        page.click("#follow")
        page.until(f"{DONE} && document.querySelectorAll('.answer .text').length == 4")
        page.until("!document.querySelector('.waiting')")
        assert page.value(TEXTS) == [["base 0 1", "base 0 1"], ["sst 0 1", "sst 0 1"]]
        asked = "[...document.querySelectorAll('.answer:first-child .asked')].map(p => p.lastChild.textContent)"
        assert page.value(asked) == ["good film", "and now"]
        marks = "[...document.querySelectorAll('mark')].map(m => m.textContent)"
        assert set(page.value(marks)) == {"sst"}
        page.click("#marks")
        assert len(page.value(marks)) == 1  # that of the turn before
        assert page.value("document.querySelector('#prompt').value") == ""
    later = engine.asked[2:]
    assert all(len(prompt) > len(first[0]) and prompt[: len(first[0]) - 4] == first[0][:-4] for prompt, _ in later)
    assert {sampling.seed for _, sampling in engine.asked} == {7}


@browser
def test_stop_is_no_error_and_classes_asks_those_with_labels(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    engine.store = FakeStore(
        FakeEntry(name="sst", digest=digest_of("sst"), labels=("bad", "good")),
        FakeEntry(name="news", digest=digest_of("news")),
    )
    engine.gate.clear()  # answers wait
    with browsing(str(CHROMIUM), serve(engine) + "/?lang=en&models=tiny,news", tmp_path, width=390, height=700) as page:
        page.until(READY)
        page.type("#prompt", "good film")
        page.click("#run")
        page.until("scrollY > 100")  # the answers are below what a phone shows
        page.click("#stop")
        page.until("document.querySelectorAll('.answer .note').length == 2")
        assert page.value("document.querySelectorAll('.error').length") == 0
        engine.gate.set()
        page.click("#classes")
        assert page.value("document.querySelector('#run').disabled")  # neither has labels
        assert page.value("[...document.querySelector('#more').options].map(o => o.value)") == ["", "sst"]
        page.value("document.querySelector('#more').value = 'sst'")
        page.value("document.querySelector('#more').dispatchEvent(new Event('change'))")
        page.click("#run")
        page.until("document.querySelector('.bars') !== null")
        assert page.value("[...document.querySelectorAll('.answer')].map(a => a.dataset.name)") == ["sst"]
        assert page.value("document.documentElement.scrollWidth <= innerWidth")


@browser
def test_the_first_screen_offers_an_example(
    engine: FakeEngine, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.serving.page import routes

    monkeypatch.setattr(routes, "read_metadata", lambda *_: SimpleNamespace(record={}))
    monkeypatch.setattr(routes, "example_of", lambda *_, **__: {"mode": "text", "text": "once <b>upon</b>"})
    with browsing(str(CHROMIUM), serve(engine) + "/?lang=en&models=sst", tmp_path) as page:
        page.until("!document.querySelector('#example').hidden")
        page.click("#useExample")
        assert page.value("document.querySelector('#prompt').value") == "once <b>upon</b>"
        assert page.value("document.querySelector('#text').checked")
        page.until("document.querySelector('#example').hidden && !document.querySelector('#run').disabled")
