"""A study folder -> one self-contained HTML page and Markdown, in English and Traditional Chinese.

Reads the folder and knows nothing of training: rendering again never trains again.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

import loralab
from loralab import atomic
from loralab.errors import LoralabError, OutputError
from loralab.studies import store, verdicts
from loralab.studies.advice import advised, grouped
from loralab.studies.catalog import STUDIES
from loralab.studies.figures import drawn
from loralab.studies.message import Message, Table
from loralab.studies.runner import records
from loralab.studies.section import Section, section
from loralab.studies.study import Finding
from loralab.studies.wording import LANGUAGES, UNKNOWN, formatted, say

FIGURES = "figures"
BIGGEST = 6  # findings that are named at the end
MARKS = {"better": "▲", "worse": "▼", "equivalent": "=", "undecided": "?", "decided": "✓"}
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the page needs of the bundle
Drawn = dict[tuple[str, str], dict[str, dict[str, Any]]]  # study and chart -> language -> Vega-Lite
PAGE, MARKDOWN = "report.html", {"en": "report.md", "zh-TW": "report.zh-TW.md"}


def render(folder: Path, language: str) -> list[Section]:
    """Write every form of the report; return the studies with their answers.

    Raises:
        OutputError: the folder holds no study, or cannot be written.
    """
    sections = _sections(folder)
    store.write_results(folder, {s.name: s.records for s in sections})
    verdicts.write(folder, {s.name: (s.setup, s.records, s.answer) for s in sections})
    content, charts = content_of(sections), charts_of(sections)
    _write_figures(folder / FIGURES, charts)
    for code in LANGUAGES:
        atomic.write_file(folder / MARKDOWN[code], markdown(content, code))
    atomic.write_file(folder / PAGE, page(content, charts, language))
    return sections


def _sections(folder: Path) -> list[Section]:
    """Return the studies of a folder with their answers."""
    try:
        found = records(folder)
        return [section(name, setup, own, str(folder)) for name, (setup, own) in in_order(found).items()]
    except LoralabError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # every field was of its type: a record lacks what its study measures
        raise OutputError(
            f"{folder}: what its runs/ hold is not what its {store.STUDY} describes "
            f"({type(error).__name__}: {error}); remove the damaged runs, and go on",
            code="damaged_study",
            field="folder",
        ) from error


def in_order(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the questions in the source's order, then the user's own studies."""
    names = [*STUDIES, *(name for name in found if name not in STUDIES)]
    return {name: found[name] for name in names if name in found}


def content_of(sections: Sequence[Section]) -> dict[str, Any]:
    """Return what both forms of the report speak of."""
    advice, closing = [advised(group) for group in grouped(sections)], closing_answers(sections)
    own = {"today": date.today(), "version": loralab.__version__, "message": Message, "marks": MARKS}
    return {"sections": sections, "advice": advice, "closing": closing, **own}


def closing_answers(sections: Sequence[Section]) -> list[tuple[Message, list[Message]]]:
    """Answer the source's three closing questions from the numbers."""
    claims = [(s, f) for s in sections for f in s.answer.findings]
    first: dict[str, Message] = {}
    for each, finding in sorted((pair for pair in claims if pair[1].holds), key=lambda pair: -_strength(pair[1])):
        first.setdefault(each.name, _labelled(each, finding.sentence))
    undecided = [_labelled(s, f.sentence) for s, f in claims if f.verdict == "undecided"]
    following = [_labelled(s, text) for s in sections if (text := s.said("next")) is not None]
    return [
        (Message("page.biggest"), list(first.values())[:BIGGEST] or [Message("page.nothing_exceeded")]),
        (Message("page.unclear"), undecided or [Message("page.all_decided")]),
        (Message("page.next"), following),
    ]


def _strength(finding: Finding) -> float:
    """Return how far an interval stays away from zero, in its own widths."""
    if finding.effect is None or finding.low is None or finding.high is None or finding.high == finding.low:
        return 0.0
    return float(abs(finding.effect) / (finding.high - finding.low))


def _labelled(each: Section, text: Message) -> Message:
    return Message("page.labelled", label=each.label, text=text)


def charts_of(sections: Sequence[Section]) -> Drawn:
    """Draw every chart once in each language."""
    charts = {(each.name, chart.name): chart for each in sections for chart in each.answer.figures}
    return {key: {code: drawn(chart, code) for code in LANGUAGES} for key, chart in charts.items()}


def markdown(content: Mapping[str, Any], language: str) -> str:
    """Return the report as Markdown."""
    return _template("report.md.j2").render(
        **content,
        say=lambda value: say(value, language),
        suffix="" if language == "en" else f".{language}",
        table=lambda table: markdown_table(table, language),
        figures=FIGURES,
    )


def page(content: Mapping[str, Any], charts: Drawn, language: str) -> str:
    """Return the HTML page; it needs nothing from anywhere."""
    return _template("report.html.j2").render(
        **content,
        language=language,
        both=both,
        say=say,
        cell=cell,
        charts=Markup(_inline({"-".join(key): specs for key, specs in charts.items()})),
        bundle=_bundle(),
    )


def both(value: Any) -> Markup:
    """Write something in both languages; the page shows one of them."""
    texts = [say(value, code) for code in LANGUAGES]
    if len(set(texts)) == 1:
        return Markup.escape(texts[0])
    return Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-Hant">{}</span>').format(*texts)


def cell(value: Any, form: str) -> Any:
    """Return one cell of a table: numbers in the format of their column, messages as they are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return formatted(value, form)
    return UNKNOWN if value is None else value


def markdown_table(table: Table, language: str) -> str:
    """Return a table as Markdown."""
    lines = [_line([say(column.heading, language) for column in table.columns]), _line(["---"] * len(table.columns))]
    for row in table.rows:
        lines.append(_line([say(cell(row.get(c.name), c.format), language) for c in table.columns]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _inline(content: Any) -> str:
    """Return JSON that can stand inside a script element."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")


def _write_figures(folder: Path, charts: Drawn) -> None:
    """Write charts as files: SVG in both languages, PNG in English (it needs no fonts of the reader)."""
    for (_, name), specs in charts.items():
        for code, spec in specs.items():
            suffix = "" if code == "en" else f".{code}"
            atomic.write_file(folder / f"{name}{suffix}.svg", vl_convert.vegalite_to_svg(spec))
        atomic.write_file(folder / f"{name}.png", vl_convert.vegalite_to_png(specs["en"], scale=2))


@functools.cache
def _bundle() -> Markup:
    """Return the scripts that draw charts, which take seconds to put together."""
    return Markup(vl_convert.javascript_bundle(SNIPPET).replace("</script", "<\\/script"))


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loralab.studies", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda own: bool(own and own.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)
