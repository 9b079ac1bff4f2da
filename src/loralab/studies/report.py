"""A study folder -> one self-contained HTML page and Markdown, in English and Traditional Chinese.

Reads the folder and knows nothing of training: rendering again never trains again.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from loralab.studies.catalog import RECOMMEND, STUDIES
from loralab.studies.evidence import by_arm, mean_of, metric_of, scored, seconds, size, unfinished
from loralab.studies.prepare import question_module
from loralab.studies.runner import records
from loralab.studies.study import LANGUAGES, Answer, Figure, Ground, Record, Table, Text
from loralab.values import join_pairs

OWN_TITLES = {RECOMMEND: Text("The search for a configuration", "尋找設定")}
FIGURES = "figures"
VERSION = loralab.__version__
MARKS = {"better": "▲", "worse": "▼", "equivalent": "=", "undecided": "?"}
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the page needs of the bundle
PAGE, MARKDOWN = "report.html", {"en": "report.md", "zh-TW": "report.zh-TW.md"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One study on the page."""

    name: str
    number: str
    title: Text
    ground: Ground
    answer: Answer
    records: Sequence[Record]
    left: Sequence[tuple[str, str]]
    measured: Text
    repeat: str
    apply: str


def render(folder: Path, language: str) -> dict[str, Answer]:
    """Write every form of the report; the answers by study.

    Raises:
        OutputError: the folder holds no study, or cannot be written.
    """
    sections = _sections(folder)
    store.write_results(folder, {s.name: s.records for s in sections})
    verdicts.write(folder, {s.name: (s.ground, s.records, s.answer) for s in sections})
    for each in sections:
        for figure in each.answer.figures:
            _write_figure(folder / FIGURES, figure)
    advice = [advised(group) for group in grouped(sections)]
    closing = closing_answers(sections)
    for code in LANGUAGES:
        text = (
            _environment()
            .get_template("report.md.j2")
            .render(
                sections=sections,
                advice=advice,
                closing=closing,
                say=lambda t, c=code: said(t, c),
                language=code,
                table=markdown_table,
                figures=FIGURES,
                today=date.today(),
                version=VERSION,
            )
        )
        atomic.write_file(folder / MARKDOWN[code], text)
    atomic.write_file(folder / PAGE, page(sections, advice, closing, language))
    return {s.name: s.answer for s in sections}


def _sections(folder: Path) -> list[Section]:
    """The studies of a folder with their answers."""
    try:
        found = records(folder)
        return [section(name, ground, own) for name, (ground, own) in in_order(found).items()]
    except LoralabError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # every field was of its type: a record lacks what its study measures
        raise OutputError(
            f"{folder}: what its runs/ hold is not what its {store.STUDY} describes "
            f"({type(error).__name__}: {error}); remove the damaged runs, and go on"
        ) from error


def in_order(found: Mapping[str, Any]) -> dict[str, Any]:
    """The questions in the source's order, then the user's own studies."""
    names = [*STUDIES, *(name for name in found if name not in STUDIES)]
    return {name: found[name] for name in names if name in found}


def section(name: str, ground: Ground, own: Sequence[Record]) -> Section:
    """A study with its answer."""
    question = STUDIES.get(name)
    title = question.title if question else OWN_TITLES.get(name, Text(name, name))
    answer = question_module(name).conclude(own, ground)
    return Section(
        name=name,
        number=question.number if question else "",
        title=title,
        ground=ground,
        answer=answer,
        records=own,
        left=unfinished(own),
        measured=measured(ground, own),
        repeat=repeat_command(ground),
        apply=apply_command(ground, answer.advice, own),
    )


def measured(ground: Ground, own: Sequence[Record]) -> Text:
    """How the runs of a study were made equal, and what they cost."""
    fields, rows = ground.fields, ground.rows
    cost = sum(r.seconds for r in own)
    rates = _rates(ground, own)
    steps, batch = fields.get("max_steps"), fields.get("batch_size")
    return Text(
        f"{ground.model} on {ground.data}: {steps} steps of {batch} rows, the same rows in the same "
        f"order for every arm; scored on {rows.get('test')} test rows; "
        f"{_seeds(own, ground)} seed{'s' if ground.seeds > 1 else ''}. {rates.en} Runs took "
        f"{seconds(cost)}.",
        f"{ground.model} 於 {ground.data}：每組 {steps} 步、每步 {batch} 筆，資料與順序完全相同；"
        f"以 {rows.get('test')} 筆測試資料評分；{_seeds(own, ground)} 個隨機種子。{rates.zh}"
        f"訓練與評分共 {seconds(cost)}。",
    )


def _seeds(own: Sequence[Record], ground: Ground) -> str:
    """How many seeds the arms had; those that could still be the best had more."""
    counts = sorted({len(runs) for runs in by_arm(own).values() if not runs[0].arm.plain}) or [ground.seeds]
    return f"{counts[0]}–{counts[-1]}" if counts[0] != counts[-1] else str(counts[0])


def _rates(ground: Ground, own: Sequence[Record]) -> Text:
    """How the learning rates of a study came about."""
    looked = sum(r.searched for r in own)
    if looked:
        return Text(
            f"The learning rate of every arm was tuned by successive halving over "
            f"{len(ground.rates)} rates around the method's usual one ({seconds(looked)}).",
            f"每個組別的學習率都以連續減半法在慣用值附近的 {len(ground.rates)} 個值中搜尋（{seconds(looked)}）。",
        )
    if len({r.arm.fields.get("learning_rate") for r in own} - {None}) > 1:
        return Text("Every arm names its own learning rate.", "每個組別各自指定學習率。")
    return Text(
        "The learning rate was not tuned for each arm; another could favour another arm.",
        "學習率沒有逐組調整；換一個學習率可能有利於另一組。",
    )


REPEATED = {  # flags of a study, and the fields of its ground that they set
    "--steps": "max_steps",
    "--batch-size": "batch_size",
    "--precision": "precision",
    "--max-length": "max_length",
}


def repeat_command(ground: Ground) -> str:
    """What runs the study again."""
    if ground.study not in STUDIES and ground.study != RECOMMEND:
        return shlex.join(["loralab", "study", f"{ground.study}.toml"])
    search = ground.study == RECOMMEND
    parts = ["loralab", *(["recommend"] if search else ["study", ground.study])]
    parts += ["--model", ground.model, "--data", ground.data, *_map(ground)]
    parts += ["--quick"] if ground.quick else ["--seeds", str(ground.seeds)]
    for flag, field in REPEATED.items():
        parts += [flag, str(ground.fields[field])] if field in ground.fields else []
    parts += ["--test-rows", str(ground.rows["test"])]
    parts += ["--values", ",".join(ground.values)] if ground.values and not search else []
    if ground.seeds_max > ground.seeds:
        parts += ["--seeds-max", str(ground.seeds_max)]
    parts += ["--margin", f"{ground.margin:g}"] if ground.margin is not None else []
    parts += ["--metric", ground.metric] if ground.metric else []
    parts += ["--fixed-lr"] if ground.fixed_lr else []
    if ground.fixed_lr and "learning_rate" in ground.fields:  # else it is the question's own
        parts += ["--learning-rate", str(ground.fields["learning_rate"])]
    return shlex.join(parts)


def _map(ground: Ground) -> list[str]:
    return ["--map", join_pairs(ground.mapping)] if ground.mapping else []


def apply_command(ground: Ground, advice: Mapping[str, Any], own: Sequence[Record]) -> str:
    """What trains as the answer says; empty where it gives no advice."""
    if not advice:
        return ""
    parts = ["loralab", "train", "--model", ground.model, "--data", ground.data, *_map(ground)]
    fields = dict(advice)
    if "learning_rate" not in fields and (rate := rate_for(advice, own)):
        fields["learning_rate"] = rate
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag if value else f"--no-{flag[2:]}")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts += [flag, shown]
    return shlex.join([*parts, "--output-dir", "runs/chosen"])


def rate_for(advice: Mapping[str, Any], own: Sequence[Record]) -> float | None:
    """The learning rate of the measured arm that is nearest to the advised fields."""
    rated = [r for r in own if r.rate and r.arm.fields.get("method") == advice.get("method", "lora")]
    return nearest_to(advice, rated).rate if rated else None


def nearest_to(advice: Mapping[str, Any], own: Sequence[Record]) -> Record:
    """The record whose arm has most of the advised fields, and the fewest others."""

    def alike(record: Record) -> tuple[int, int]:
        fields = record.arm.fields
        return sum(fields.get(k) == v for k, v in advice.items()), -len(fields)

    return max(own, key=alike)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The configuration that the studies of one model and data add up to."""

    model: str
    data: str
    fields: Mapping[str, Any]
    reasons: Sequence[tuple[str, str, str, Text]]
    cost: Text
    command: str
    quick: bool


def grouped(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections that stand on the same model and data, if any of them gives advice."""
    groups: dict[tuple[str, str], list[Section]] = {}
    for each in sections:
        groups.setdefault((each.ground.model, each.ground.data), []).append(each)
    return [group for group in groups.values() if any(s.answer.advice for s in group)]


def advised(group: Sequence[Section]) -> Advice:
    """All that the studies advise together, with what each contributes and what it costs."""
    fields: dict[str, Any] = {}
    reasons = []
    records_: list[Record] = []
    for each in group:
        new = {k: v for k, v in each.answer.advice.items() if k not in fields}
        fields |= new
        records_ += each.records
        if new:
            shown = ", ".join(f"{k} = {_flat(v)}" for k, v in new.items())
            reasons.append((each.name, each.number or each.name, shown, each.answer.sentence))
    ground = group[0].ground
    return Advice(
        model=ground.model,
        data=ground.data,
        fields=fields,
        reasons=reasons,
        cost=_cost(fields, records_),
        command=apply_command(ground, fields, records_),
        quick=ground.quick,
    )


def _cost(fields: Mapping[str, Any], own: Sequence[Record]) -> Text:
    """What a run of the nearest measured arm took."""
    timed = [r for r in own if r.numbers.get("step_seconds")]
    if not timed:
        return Text("", "")
    near = nearest_to(fields, timed)
    step, peak = seconds(mean_of([near], "step_seconds")), size(mean_of([near], "peak_bytes"))
    disk = size(mean_of([near], "file_bytes"))
    metric = metric_of([near])
    score_ = scored([near], metric) if near.items.get("score") else "–"
    return Text(
        f"The nearest arm that was measured ({near.arm.name}): {step} a step, {peak} of memory, "
        f"{disk} on disk, test {metric.text.en} {score_}.",
        f"最接近的實測組別（{near.arm.name}）：每步 {step}，記憶體 {peak}，檔案 {disk}，"
        f"測試{metric.text.zh} {score_}。",
    )


def closing_answers(sections: Sequence[Section]) -> list[tuple[Text, list[Text]]]:
    """The source's three closing questions, answered from the numbers."""
    claims = [(s, f) for s in sections for f in s.answer.findings]
    held = [(s, f) for s, f in claims if f.holds]
    held.sort(key=lambda pair: -_strength(pair[1]))
    first: dict[str, Text] = {}
    for each, finding in held:
        first.setdefault(each.name, _numbered(each, finding.sentence))
    open_ = [_numbered(s, f.sentence) for s, f in claims if f.verdict == "undecided"]
    following = [_numbered(s, s.answer.next) for s in sections if s.answer.next.en]
    nothing = [Text("Nothing exceeded noise.", "沒有任何差異超出雜訊。")]
    none_open = [Text("Nothing: every comparison was decided.", "沒有：每個比較都有了結論。")]
    return [
        (
            Text("What is the biggest finding?", "完成這個 Task 後，你最大的收穫是什麼？"),
            list(first.values())[:6] or nothing,
        ),
        (Text("What is still unclear?", "還有哪些不理解的地方？"), open_ or none_open),
        (Text("What would you explore next?", "下一步你想探索什麼？"), following),
    ]


def _strength(finding: Any) -> float:
    """How far an interval stays away from zero, in its own widths."""
    if None in (finding.low, finding.high) or finding.high == finding.low:
        return 0.0
    return float(abs(finding.effect) / (finding.high - finding.low))


def _numbered(each: Section, text: Text) -> Text:
    label = each.number or each.name
    return Text(f"{label}: {text.en}", f"{label}：{text.zh}")


def page(sections: Sequence[Section], advice: Sequence[Advice], closing: Any, language: str) -> str:
    """The HTML page; it needs nothing from anywhere."""
    charts = {
        f"{s.name}-{f.name}-{code}": f.specs[code] for s in sections for f in s.answer.figures for code in LANGUAGES
    }
    script = vl_convert.javascript_bundle(SNIPPET)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            sections=sections,
            advice=advice,
            closing=closing,
            language=language,
            both=both,
            cell=cell_html,
            marks=MARKS,
            today=date.today(),
            version=VERSION,
            charts=Markup(_inline(charts)),
            bundle=Markup(script.replace("</script", "<\\/script")),
        )
    )


def both(text: Any) -> Markup:
    """A text in both languages; the page shows one of them."""
    if not isinstance(text, Text):
        return Markup.escape(str(text))
    if text.en == text.zh:
        return Markup.escape(text.en)
    return Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-Hant">{}</span>').format(
        text.en, text.zh
    )


def cell_html(value: Any) -> Markup:
    """One cell of a table."""
    return both(value)


def said(text: Any, language: str) -> str:
    """A text in one language."""
    return text.said(language) if isinstance(text, Text) else str(text)


def markdown_table(table: Table, language: str) -> str:
    """A table as Markdown."""
    head = [said(c, language) for c in table.columns]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line([said(value, language) for value in row]) for row in table.rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _inline(content: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")


def _flat(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _write_figure(folder: Path, figure: Figure) -> None:
    """A chart as files: SVG in both languages, PNG in English (it needs no fonts of the reader)."""
    for code in LANGUAGES:
        name = figure.name if code == "en" else f"{figure.name}.{code}"
        svg = vl_convert.vegalite_to_svg(dict(figure.specs[code]))
        atomic.write_file(folder / f"{name}.svg", svg)
    png = vl_convert.vegalite_to_png(dict(figure.specs["en"]), scale=2)
    atomic.write_file(folder / f"{figure.name}.png", png)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("loralab.studies", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
    )
