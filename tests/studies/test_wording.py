"""Two catalogues with the same messages and the same values; no message without a speaker."""

import ast
import itertools
import re
import string
from pathlib import Path

import pytest

import loralab
from loralab.studies import catalog
from loralab.studies.message import Message, clauses, names, sentences
from loralab.studies.wording import FORMATS, JOINS, LANGUAGES, PLURAL, UNKNOWN, catalogue, formatted, say

USUAL = ("title", "method", "caution", "next", "chart")  # of every question: section.py, compare.py
STUDIES = Path(loralab.__file__).parent / "studies"
PYTHON = re.compile(r"[+]?,?(\.\d+)?[a-z%]?")  # formats of Python that numbers take here


def values_of(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def specs_of(template: str) -> set[str]:
    return {spec for _, field, spec, _ in string.Formatter().parse(template) if field is not None and spec}


def patterns() -> set[str]:
    """Return every text of the sources that may be a key, as an expression; what is computed stands for anything."""
    found = set()
    for file in [*STUDIES.rglob("*.py"), *STUDIES.glob("*.j2")]:
        source = file.read_text(encoding="utf-8")
        if file.suffix == ".j2":
            found |= {re.escape(key) for key in re.findall(r"message\('([\w.]+)'", source)}
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {re.escape(text) for text in (node.value, node.value.rpartition(":")[2])}
            if isinstance(node, ast.JoinedStr) and begins_with_a_section(node):
                parts = [re.escape(p.value) if isinstance(p, ast.Constant) else r"[\w+-]+" for p in node.values]
                found.add("".join(map(str, parts)))
    return found


def begins_with_a_section(text: ast.JoinedStr) -> bool:
    """Tell whether a computed key says its section; a column's is known by its Column(...) alone."""
    first = text.values[0]
    return isinstance(first, ast.Constant) and first.value != "column."


def test_both_languages_have_the_same_messages_with_the_same_values() -> None:
    english, chinese = map(catalogue, LANGUAGES)
    assert english.keys() == chinese.keys()
    for key, template in english.items():
        assert values_of(template) == values_of(chinese[key]), key


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_format_exists(language: str) -> None:
    for key, template in catalogue(language).items():
        for spec in specs_of(template):
            known = spec in FORMATS or spec in JOINS or spec.startswith(PLURAL)
            assert known or PYTHON.fullmatch(spec), (key, spec)


def test_every_message_is_said_somewhere() -> None:
    said = re.compile("|".join(sorted(f"(?:{pattern})" for pattern in patterns() if pattern)))
    usual = {f"{name}.{part}" for name in (*catalog.STUDIES, "grid", "recommend") for part in USUAL}
    spoken = [key for key in catalogue("en") if said.fullmatch(key) or said.fullmatch(key.removeprefix("column."))]
    silent = catalogue("en").keys() - usual - set(spoken)
    assert [key for key in silent if not key.startswith("joint.")] == []


def test_every_message_that_is_said_exists() -> None:
    keys = set(re.findall(r'Message\(\s*"([\w.+-]+)"', "".join(_sources())))
    sections = "|".join(sorted({key.partition(".")[0] for key in catalogue("en")}))
    keys |= set(re.findall(rf'"(?:\w+:[\w. ]*:)?((?:{sections})\.[\w+-]+)"', "".join(_sources())))  # of charts, columns
    keys |= {f"column.{name}" for name in re.findall(r'Column\(\s*"(\w+)"(?:, "[\w. ]+")?\)', "".join(_sources()))}
    assert keys - catalogue("en").keys() == set()


def _sources() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in STUDIES.rglob("*.py")]


def test_messages_stand_in_messages_in_the_language_of_the_whole() -> None:
    inner = Message("metric.accuracy")
    for language in LANGUAGES:
        text = say(Message("page.labelled", label=inner, text="r=8"), language)
        assert say(inner, language) in text
        assert "r=8" in text
    assert sentences(inner, None, inner).values["parts"] == [inner, inner]
    assert say(names(["a"]), "en") == "a"
    assert say(clauses([]), "en") == ""


def test_chinese_has_no_space_where_a_message_meets_it_and_names_keep_theirs() -> None:
    texts = [say(Message("contrast.needs_both"), "zh-TW"), "r=8", "資料 一"]
    for inner, outer in itertools.permutations(texts, 2):
        said = say(Message("contrast.single", a=inner, b=outer), "zh-TW")
        assert [said.count(inner), said.count(outer)] == [1, 1]
        rest = said.replace(inner, "X").replace(outer, "Y")
        assert ("X " in rest, " Y" in rest) == (inner == "r=8", outer == "r=8")


def test_numbers_are_written_in_units_that_fit() -> None:
    assert [formatted(value, "bytes") for value in (12, 1_500, 2_000_000, 3.21e9)] == [
        "12 B",
        "1.5 kB",
        "2.0 MB",
        "3.21 GB",
    ]
    assert [formatted(value, "seconds") for value in (2e-6, 0.25, 12.34)] == ["2 µs", "250 ms", "12.3 s"]
    assert formatted(float("nan"), "count") == formatted(None, "plain") == UNKNOWN
    assert formatted(0.123, "percent") == "12.3 %"
    assert [formatted(value, "probability") for value in (0.0, 0.004, 0.5, 0.995, 1.0)] == [
        "0 %",
        "< 1 %",
        "50 %",
        "> 99 %",
        "100 %",
    ]
