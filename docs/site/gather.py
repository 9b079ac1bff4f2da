"""Gather the sources of the documentation site in build/docs, from files alone.

    python docs/site/gather.py       # `make docs` runs it, then mkdocs

What documents link to outside of docs/ becomes a page, so that every link works without a network: Markdown under
project/, sources under source/. A page without a Traditional Chinese text stands there in English, under a line that
says so. llms.txt lists the pages, llms-full.txt holds them.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "docs"
CONFIG = ROOT / "mkdocs.yml"
CHINESE = ".zh-TW.md"
START = {"README.md": "index.md", "README.zh-TW.md": "index.zh-TW.md"}
ENGLISH_ONLY = '!!! note "本頁尚無中文版，以下是英文原文。"\n'
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
# to Python-Markdown a list begins below an empty line only
TIGHT_LIST = re.compile(r"^(?!- |[|#>\s]|\d+\. )(.+)\n(?=- )", re.M)
BLOCK = r"^(`{3,}).*?^\1`*[ \t]*$"
CODE = re.compile(BLOCK + r"|(?<!`)(`+)(?!`).*?(?<!`)\2(?!`)", re.S | re.M)
LANGUAGES = {".py": "python", ".h": "c", ".c": "c", ".mjs": "javascript", ".toml": "toml", ".sh": "sh"}


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects, without mkdocs."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def main() -> None:
    """Write build/docs anew."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    order = list(named(yaml.load(CONFIG.read_text(encoding="utf-8"), Loader)["nav"]))
    pages = gathered([ROOT / name.removeprefix("project/") for _, name in order if name.startswith("project/")])
    shutil.copytree(ROOT / "docs", OUTPUT, ignore=shutil.ignore_patterns("site", "*.md", "*.parquet", "board.json"))
    for name, text in {**pages, **in_chinese(pages)}.items():
        write(OUTPUT / name, text)
    write(OUTPUT / "llms.txt", index(order, pages))
    write(OUTPUT / "llms-full.txt", "\n\n".join(f"<!-- {name} -->\n\n{pages[name]}" for _, name in order))


def write(path: Path, text: str) -> None:
    """Write a text, and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gathered(more: list[Path]) -> dict[str, str]:
    """Return page -> Markdown, of docs/ and some more, and of all that is linked to from there on."""
    waiting = [*sorted((ROOT / "docs").rglob("*.md")), *more]
    pages: dict[str, str] = {}
    while waiting:
        path = waiting.pop(0)
        if page_of(path) not in pages:
            pages[page_of(path)], targets = page(path)
            waiting += targets
    return pages


def page(path: Path) -> tuple[str, list[Path]]:
    """Return the Markdown of a file or folder, and what it links to outside of docs/."""
    if path.suffix != ".md":
        return (listing(path) if path.is_dir() else source(path)), []
    targets = []

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(path.parent / link[1]))
        if page_of(target).startswith(("project/", "source/")):
            targets.append(target)
        where = os.path.relpath(page_of(target), Path(page_of(path)).parent)
        return where + (link[2] or "")

    text = outside(re.compile(BLOCK, re.S | re.M), path.read_text(encoding="utf-8"), partial(TIGHT_LIST.sub, r"\1\n\n"))
    return outside(CODE, text, partial(LINK.sub, moved)), targets


def page_of(path: Path) -> str:
    """Return where a file of the repository stands in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    if name in START:
        return START[name]
    if name.startswith("docs/") and not name.startswith("docs/site"):
        return name.removeprefix("docs/")
    if path.suffix == ".md":
        return f"project/{name}"
    return f"source/{name.replace('.', '-')}.md"


def source(path: Path) -> str:
    """Return a source file as a page; it is left out of the search."""
    text = path.read_text(encoding="utf-8")
    return f"{front(path)}`````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n`````\n"


def listing(folder: Path) -> str:
    """Return the names in a folder as a page."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith(("__", ".")))
    return front(folder) + "\n".join(f"- `{name}`" for name in names) + "\n"


def front(path: Path) -> str:
    """Return the head of a page of a source file or folder."""
    name = path.relative_to(ROOT).as_posix()
    return f"---\ntitle: {path.name}\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"


def outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """Apply a function to what stands between the matches of a pattern, such as code."""
    parts, end = [], 0
    for code in pattern.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def in_chinese(pages: dict[str, str]) -> dict[str, str]:
    """Return the pages that have no Traditional Chinese text, with a line that says so under the title."""
    return {
        name.removesuffix(".md") + CHINESE: re.sub(r"^(# .*\n)", rf"\1\n{ENGLISH_ONLY}", text, count=1, flags=re.M)
        for name, text in pages.items()
        if not name.startswith("source/")
        and not name.endswith(CHINESE)
        and name.removesuffix(".md") + CHINESE not in pages
    }


def named(nav: list[Any], section: str = "") -> Iterator[tuple[str, str]]:
    """Yield (section, page) of a nav, in its order; a page stands in the section around it."""
    for entry in nav:
        for title, below in entry.items():
            if isinstance(below, str):
                yield section, below
            else:
                yield from named(below, section or title)


def index(order: list[tuple[str, str]], pages: dict[str, str]) -> str:
    """Return llms.txt (llmstxt.org): a title, a summary, and links with a sentence, by section."""
    lines = ["# loralab", "", f"> {summary(pages['index.md'])}", ""]
    before = ""
    for section, name in order:
        if section != before:
            lines += [f"## {section}", ""] if lines[-1] == "" else ["", f"## {section}", ""]
            before = section
        title = next(iter(re.findall(r"^# (.*)", pages[name], re.M)), name)
        lines.append(f"- [{title}]({link_to(name)}): {summary(pages[name])}".removesuffix(": "))
    lines += ["", "## Optional", "", "- [All pages in one file](llms-full.txt)"]
    return "\n".join(lines) + "\n"


def link_to(page: str) -> str:
    """Return where a page stands in the site."""
    return re.sub(r"README\.md$", "index.md", page).removesuffix(".md") + ".html"


def summary(text: str) -> str:
    """Return the first sentence below the title of a page, in plain text."""
    below = re.split(r"^# .*$", text, maxsplit=1, flags=re.M)[-1]
    blocks = CODE.sub(lambda code: code[0] if code[2] else "", below).split("\n\n")
    first = next((b for b in map(str.strip, blocks) if re.match(r"[\w`\"*\[(]", b)), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first.split())).replace("*", "")
    return "" if plain.endswith(":") else re.split(r"(?<=\.)\s", plain, maxsplit=1)[0]


if __name__ == "__main__":
    sys.exit(main())
