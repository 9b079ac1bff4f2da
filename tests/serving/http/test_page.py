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

from loralab.serving.http.keys import Key, Keys
from loralab.serving.page.routes import FILES, FOLDER, START

engine, serve = served.engine, served.serve
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
ELSEWHERE = re.compile(r"https?://[\w.-]+|[\"'(]//[\w.-]+")


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


def texts(ending: str) -> dict[str, str]:
    """Return the page's files of an ending, by name."""
    return {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES if name.endswith(ending)}


def test_the_page_needs_nothing_of_other_sites() -> None:
    for name, text in texts("").items():
        assert ELSEWHERE.findall(text) == [], name
        assert not re.search(r"@import|\burl\(|innerHTML|style=", text), name  # a name is text, never markup
    page = texts(".html")[START]
    linked = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)
    imported = [name for text in texts(".js").values() for name in re.findall(r'from "\./([^"]+)"', text)]
    assert {*(name.removeprefix("page/") for name in linked), *imported, START} == set(FILES)
    assert "<style" not in page
    assert re.findall(r"<script(?![^>]*src=)", page) == []


def test_what_the_page_names_is_there() -> None:
    page, code = texts(".html")[START], "".join(texts(".js").values())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    named = {*re.findall(r'\$\("(\w+)"\)', code), *re.findall(r'(?:for|aria-labelledby)="(\w+)"', page)}
    assert named - set(ids) == set()
    for field in re.findall(r'<(?:input|textarea|select)[^>]*\bid="([^"]+)"', page):
        within = re.search(rf'<label[^>]*><input[^>]*id="{field}"', page)
        described = f'["{field}", "{field}"]' in code or (field == "system" and "aria-label" in page)
        assert f'for="{field}"' in page or within or described, f"{field} has no label"


def test_headings_go_down_one_level_at_a_time() -> None:
    page, columns = texts(".html")[START], texts(".js")["answers.js"]
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels == [1, 2, 2, 2]
    assert set(re.findall(r'make\("h(\d)"', columns)) == {"3"}


def test_both_languages_have_the_same_words() -> None:
    text = texts(".js")["words.js"]
    english, chinese = text[text.index("export const WORDS") : text.index("const wanted")].split('"zh-TW": {')
    words = [re.findall(r"\b(\w+): (?:\"|\w+ =>|\()", part) for part in (english, chinese)]
    assert words[0] == words[1]
    code = texts(".html")[START] + "".join(texts(".js").values())
    used = set(re.findall(r'data-say="(\w+)"', code)) | set(re.findall(r"\bsay\.(\w+)", code))
    used |= set(re.findall(r'\["(\w+)", ', code)) - {"prompt"} | set(re.findall(r'this\.tool\("(\w+)"', code))
    assert used - {"system", "max_tokens"} - set(words[0]) == set()
    assert set(words[0]) - used - {"filter", "more"} == set()


def test_the_server_lets_nothing_else_into_the_page(engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine)
    for path, kind in {"": "text/html", **{f"page/{name}": kind for name, kind in FILES.items()}}.items():
        response = httpx.get(f"{where}/{path}")
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
    for path in ("page/routes.py", "page/nothing.js", "page/..%2fapi.py"):
        assert httpx.get(f"{where}/{path}").status_code == 404


@browser
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_answers_stream_into_their_columns(mode: str, engine: FakeEngine, serve: Serve, tmp_path: Path) -> None:
    page, asked = shown(
        serve(engine), tmp_path, models="tiny,sst,news", prompt="good film", mode=mode, max_tokens=5, autorun=1
    )
    for name, word in (("", "base"), ("sst", "sst"), ("news", "news")):
        marked = f"<mark>{word}</mark>" if name else word  # what the base did not say
        assert f'<div class="text">{marked} 0 1 2 3</div>' in column(page, name)
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
