"""The page, as a browser shows it: answers stream into columns, and nothing leaves the host."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from serving import served
from serving.fakes import FakeEngine, FakeStore, digest_of
from serving.served import Serve

from loralab.serving.http.app import PAGE
from loralab.serving.http.keys import Key, Keys

engine, serve = served.engine, served.serve
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
ELSEWHERE = re.compile(r"(?:https?:)?//(?!127\.0\.0\.1)[\w.-]+")


def shown(where: str, tmp_path: Path, **query: Any) -> tuple[str, set[str]]:
    """Return the page once it is at rest, and the hosts that were asked or looked up."""
    assert CHROMIUM is not None
    log = tmp_path / "net.json"
    address = f"{where}/?{urlencode({'lang': 'en', **query})}"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, hosts(log)


def hosts(log: Path) -> set[str]:
    """Hosts in the addresses of requests that pages made."""
    text = log.read_text(encoding="utf-8")
    text = text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}"
    kinds = json.loads(text)
    start = kinds["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    found = set()
    for event in kinds["events"]:
        parameters = event.get("params", {})
        if event["type"] == start and "url" in parameters:
            own = re.match(r"https?://([^/:]+)", parameters["url"])
            # what the browser itself asks carries no page's address
            if own and not parameters.get("initiator", "").startswith("not an origin"):
                found.add(own[1])
    return found


def column(page: str, name: str) -> str:
    """Return the text in the column of one model."""
    start = page.index(f'<article class="card answer" data-name="{name}"')
    return page[start : page.index("</article>", start)]


def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert ELSEWHERE.findall(text) == []
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import|url\(", text)
    for field in re.findall(r'<(?:input|textarea)[^>]*\bid="([^"]+)"', text):
        named = f'for="{field}"' in text or f'$("{field}").setAttribute("aria-label"' in text
        assert named, f"{field} has no label"


def test_both_languages_have_the_same_words() -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("const WORDS")
    english, chinese = text[start : text.index("const MOST")].split('"zh-TW": {')
    words = [re.findall(r"\b(\w+): (?:\"|\()", part) for part in (english, chinese)]
    assert words[0] == words[1]
    used = set(re.findall(r'data-say="(\w+)"', text)) | set(re.findall(r"\bsay\.(\w+)", text))
    assert used - set(words[0]) == set()


def test_the_server_lets_nothing_else_into_the_page(engine: FakeEngine, serve: Serve) -> None:
    response = httpx.get(serve(engine) + "/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "connect-src 'self'" in response.headers["content-security-policy"]


@browser
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_answers_stream_into_their_columns(mode: str, engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    page, asked = shown(
        serve(engine), tmp_path, models="tiny,sst,news", prompt="good film", mode=mode, max_tokens=5, autorun=1
    )
    for name, word in (("", "base"), ("sst", "sst"), ("news", "news")):
        assert f'<div class="text">{word} 0 1 2 3</div>' in column(page, name)
        assert "First token" in column(page, name)
    assert digest_of("sst")[:12] in column(page, "sst")
    assert (min(len(ids) for ids, _ in engine.asked) > 2) == (mode == "chat")  # the template
    assert asked == {"127.0.0.1"}


@browser
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_tokens_are_counted_and_not_pieces(mode: str, engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    """A piece of text may take several tokens, also while an answer is still being written."""
    engine.tokens_a_piece = 3
    for held, expected in ((None, "15…"), (2, "6")):
        engine.held_after = held
        page, _ = shown(serve(engine), tmp_path, models="sst", prompt="good film", mode=mode, max_tokens=5, autorun=1)
        assert ("text waiting" in column(page, "sst")) == (held is not None)
        numbers = re.findall(r"<dd[^>]*>([^<]*)</dd>", column(page, "sst"))
        assert numbers[-1] == expected


@browser
def test_a_warning_stands_in_the_column(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    engine.warning = "the prompt is <b>unlike</b> training"
    page, _ = shown(serve(engine), tmp_path, models="sst", prompt="good", mode="text", max_tokens=5, autorun=1)
    assert '<p class="warning">the prompt is &lt;b&gt;unlike&lt;/b&gt; training' in page


@browser
def test_an_error_stands_in_the_column_it_belongs_to(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    submit = engine.submit

    def fails_for_news(prompt: Any, *, adapter: Any, sampling: Any, structure: Any = None) -> Any:
        wrong = adapter is not None and adapter.name == "news"
        engine.fail = "the numbers are no longer finite" if wrong else ""
        return submit(prompt, adapter=adapter, sampling=sampling)

    engine.submit = fails_for_news  # type: ignore[method-assign]
    engine.store.load("<b>bold</b>", "x")
    engine.max_waiting = 9
    page, _ = shown(serve(engine), tmp_path, models="news,<b>bold</b>", prompt="good film", max_tokens=3, autorun=1)
    assert '<p class="error"' in column(page, "news")
    assert "no longer finite" in column(page, "news")
    assert '<p class="error"' not in column(page, "&lt;b&gt;bold&lt;/b&gt;")
    long, _ = shown(serve(engine), tmp_path, models="news", prompt="good film " * 40, max_tokens=3, autorun=1)
    assert '<p class="error"' in column(long, "news")
    assert "at most 64" in column(long, "news")
    assert "<b>bold</b>" not in page  # a name is text, never markup
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


@browser
def test_classes_are_shown_as_bars(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    engine.base.kind = "sequence-classification"
    page, _ = shown(serve(engine), tmp_path, models="sst", prompt="good", autorun=1)
    assert "75.0 %" in column(page, "sst")
    assert 'style="width: 75%;"' in column(page, "sst")
    assert re.search(r'id="modes"[^>]*hidden', page)


@browser
def test_a_locked_server_asks_for_its_key(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    key = Key(name="a", sha256=hashlib.sha256(b"secret").digest())
    page, _ = shown(serve(engine, keys=Keys([key])), tmp_path)
    assert re.search(r'<section class="card notice" id="locked">', page)
    assert "sst" not in page


@browser
def test_an_empty_store_says_what_to_do(engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    engine.store = FakeStore()
    page, _ = shown(serve(engine), tmp_path, lang="zh-TW")
    assert "這裡還沒有 adapter" in page
