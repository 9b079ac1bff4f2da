"""The documentation site: links and anchors lead somewhere, the menu is whole, what is typed exists, and it builds."""

import dataclasses
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import loralab
from loralab.adapters.methods import LoRA
from loralab.cli import load_commands
from loralab.training.settings import Training

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHINESE = ".zh-TW.md"
GATHER = runpy.run_path(str(DOCS / "site" / "gather.py"))
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), GATHER["Loader"])
NAV = [page for _, page in GATHER["named"](SITE["nav"])]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *DOCS.rglob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    *ROOT.glob("examples/*/*.md"),
]
TRANSLATED = [
    "index.md",
    "coming-from.md",
    *(f"how-to/{name}.md" for name in ("adapt", "train", "compare", "prove", "serve")),
]
TYPED = [DOCS / name for page in TRANSLATED for name in (page, page.removesuffix(".md") + CHINESE)]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without code, whose brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """The names of a document's headings, as hosts of repositories and the site make them."""
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.S | re.M)
    names: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return names | set(re.findall(r'(?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(document))):
        name, _, anchor = link.partition("#")
        if ":" in name:
            continue
        target = (document.parent / name) if name else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_menu_names_every_page_once() -> None:
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if not p.name.endswith(CHINESE)}
    assert len(NAV) == len(set(NAV))
    assert {page for page in NAV if not page.startswith("project/")} == pages
    assert [
        page for page in NAV if page.startswith("project/") and not (ROOT / page.removeprefix("project/")).exists()
    ] == []


def titles(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for title, below in entry.items():
            yield title
            yield from titles(below) if isinstance(below, list) else ()


def test_the_menu_is_there_in_both_languages() -> None:
    plugin = next(entry["i18n"] for entry in SITE["plugins"] if "i18n" in entry)
    chinese = next(language for language in plugin["languages"] if language["locale"] == "zh-TW")
    assert set(titles(SITE["nav"])) == set(chinese["nav_translations"])


def typed_lines(text: str) -> list[list[str]]:
    """The loralab commands of a document: its words up to the comment, without what is quoted."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(loralab [^`]+)`", text)
    return [
        re.sub(r"\"[^\"]*\"|'[^']*'", "X", line).split("loralab ", 1)[1].split() for line in lines if "loralab " in line
    ]


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_translation_has_the_same_code(page: str) -> None:
    english, chinese = read(DOCS / page), read(DOCS / (page.removesuffix(".md") + CHINESE))
    assert typed_lines(english) == typed_lines(chinese)
    assert len(re.findall(r"^#+ ", english, re.M)) == len(re.findall(r"^#+ ", chinese, re.M))
    assert len(re.findall(r"^\|", english, re.M)) == len(re.findall(r"^\|", chinese, re.M))


@pytest.mark.parametrize("document", TYPED, ids=lambda path: path.name)
def test_what_is_typed_exists(document: Path) -> None:
    commands = load_commands().commands
    unknown = []
    for command, *words in typed_lines(read(document)):
        flags = {flag for option in commands[command].params for flag in (*option.opts, *option.secondary_opts)}
        unknown += [(command, w) for w in words if w.startswith("--") and w.partition("=")[0] not in flags]
    assert unknown == []


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a document as rows of cells, the line below the head left out."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def fields_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)(?:=[^`]*| = [^`]*|: [^`]*)?`", cell)


@pytest.mark.parametrize("document", ["coming-from.md", "coming-from.zh-TW.md"])
def test_the_fields_of_peft_and_ours_exist(document: str) -> None:
    peft = pytest.importorskip("peft")
    seen = 0
    for head, *rows in tables(read(DOCS / document)):
        classes = [
            re.fullmatch(rf"{side} `(\w+)`", cell) for side, cell in zip(("peft", "loralab"), head, strict=False)
        ]
        if not all(classes):
            continue
        for module, kind, column in zip((peft, loralab), classes, (0, 1), strict=True):
            assert kind is not None
            known = {field.name for field in dataclasses.fields(getattr(module, kind[1]))}
            named = [name for row in rows for name in fields_in(row[column])]
            assert [name for name in named if name not in known] == []
            seen += len(named)
    assert seen > 50


@pytest.mark.parametrize("document", ["coming-from.md", "coming-from.zh-TW.md"])
def test_the_fields_of_our_configuration_exist(document: str) -> None:
    known = {f.name for config in (LoRA, Training) for f in dataclasses.fields(config)}
    known |= {"model", "data", "method", "map", "output_dir"}
    ours = [row[1] for head, *rows in tables(read(DOCS / document)) for row in rows if "config.toml" in head[1]]
    named = [name for cell in ours for name in fields_in(cell) if f"`{name} = " in cell]
    assert [name for name in named if name not in known] == []
    assert len(named) > 50


def test_the_reference_is_current() -> None:
    """Else: python docs/site/reference.py."""
    made = runpy.run_path(str(DOCS / "site" / "reference.py"))["pages"]()
    assert made == {page.name: read(page) for page in (DOCS / "reference").glob("*.md")}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    for command in (["docs/site/gather.py"], ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, *command], check=False, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    fetched = re.compile(
        r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//'
    )
    pages = list(tmp_path.rglob("*.html"))
    assert [page.name for page in pages if fetched.search(read(page))] == []
    for page in map(GATHER["link_to"], NAV):
        assert (tmp_path / page).exists()
        assert (tmp_path / "zh-TW" / page).exists()
        assert f"({page})" in read(tmp_path / "llms.txt")
    assert "五分鐘上手" in read(tmp_path / "zh-TW" / "index.html")
    assert "Put an adapter into the model" in read(tmp_path / "reference" / "python.html")
