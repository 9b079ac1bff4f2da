"""The board: every claim beside what was measured; as JSON, and as a page that is written from it alone."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.errors import OutputError
from loralab.studies.claims import observations
from loralab.studies.claims.form import ABOVE, BELOW, BY_MARGIN, BY_SEED, FOLDER, OTHER_DATA, OTHER_SEEDS, WITHIN, Claim
from loralab.studies.claims.observations import Observation
from loralab.studies.claims.readings import estimate, tuned_at_edge
from loralab.studies.claims.verdict import Verdict, decide, power
from loralab.values import read_toml

FILE, PAGE = "board.json", "README.md"
UNTESTED = "untested.toml"  # what has no file of its own, and why
COLUMNS = ("claim", "source", "there", "here", "verdict", "power", "minutes")
Row = Mapping[str, Any]


def row_of(claim: Claim, found: Sequence[Observation]) -> dict[str, Any]:
    """Return a claim's row of the board.

    Args:
        found: its runs, and those of its repetitions.

    Raises:
        ValueError: it has no runs.
    """
    again = [run for run in found if run.again]
    found = [run for run in found if not run.again]
    if not found:
        raise ValueError(f"claim {claim.claim} has no runs")
    own = estimate(claim, found)
    verdict = decide(own, claim.direction, claim.threshold, claim.margin)
    return {
        "claim": claim.claim,
        "title": claim.title,
        "source": claim.source,
        "verdict": verdict,
        "there": claim.there,
        "here": _number(own.value),
        "low": _number(own.low),
        "high": _number(own.high),
        "unit": claim.unit,
        "rule": rule(claim),
        "power": _number(power(own, claim.direction, claim.margin)),
        "minutes": _number(math.fsum(run.seconds for run in found) / 60),
        "registered": claim.minutes,
        "model": claim.model,
        "data": claim.data,
        "runs": len(found),
        "seeds": len({run.seed for run in found}),
        "note": claim.note,
        "lost": sum(run.status != "done" for run in found),
        "at_edge": own.at_edge or any(run.edge for run in found) or tuned_at_edge(claim, found),
        "robustness": {**_robustness(claim, found, verdict), **_repeated(claim, again)},
        "digest": claim.digest,
    }


def _robustness(claim: Claim, found: Sequence[Observation], verdict: Verdict) -> dict[str, str]:
    """Return the verdicts of the checks that were registered beside the claim's own.

    "seeds" is the one verdict of all samples that lack a seed, or undecided where they differ; "margin" that
    of twice or half the margin, whichever makes the same verdict harder to reach.
    """
    checks: dict[str, str] = {}
    seeds = sorted({run.seed for run in found})
    if BY_SEED in claim.robustness and not claim.exact and len(seeds) > 2:
        each = {_verdict(claim, [run for run in found if run.seed != seed]) for seed in seeds}
        checks[BY_SEED] = each.pop() if len(each) == 1 else "undecided"
    if BY_MARGIN in claim.robustness:
        factor = 2.0 if (claim.direction == WITHIN) == (verdict == "refuted") else 0.5
        checks[BY_MARGIN] = _verdict(replace(claim, margin=factor * claim.margin), found)
    return checks


def _repeated(claim: Claim, again: Sequence[Observation]) -> dict[str, str]:
    """Return the verdicts of the claim's other seeds and other data, of those that have run."""
    runs = {check: [run for run in again if run.again == check] for check in (OTHER_SEEDS, OTHER_DATA)}
    return {check: _verdict(claim, own) for check, own in runs.items() if own}


def _verdict(claim: Claim, found: Sequence[Observation]) -> Verdict:
    return decide(estimate(claim, found), claim.direction, claim.threshold, claim.margin)


def rule(claim: Claim) -> str:
    """Say what was registered."""
    at, margin = claim.threshold, claim.margin
    if claim.direction == WITHIN:
        return f"{at - margin:g} to {at + margin:g}"
    sign = {ABOVE: ">", BELOW: "<"}[claim.direction]
    return f"{sign} {at:g}, margin {margin:g}"


def write(folder: Path, rows: Sequence[Row], found: Sequence[Observation]) -> None:
    """Write the board, its records and its page."""
    ordered = sorted(rows, key=lambda row: int(row["claim"]))
    observations.write(folder, found)
    atomic.write_file(folder / FILE, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    write_page(folder)


def read(folder: Path) -> list[Row]:
    """Return the rows of a folder's board.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    file = folder / FILE
    try:
        rows = json.loads(file.read_bytes())
        page(rows)  # which reads every key
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        problem = f"a row lacks {error}" if isinstance(error, KeyError) else str(error)
        raise OutputError(f"{file} cannot be read: {problem}", code="cannot_read", field=FILE) from None
    return list(rows)


def write_page(folder: Path) -> Path:
    """Write the page from the board that stands beside it."""
    return atomic.write_file(folder / PAGE, page(read(folder)))


def page(rows: Sequence[Row]) -> str:
    """Return the board as Markdown."""
    counts = {name: sum(row["verdict"] == name for row in rows) for name in ("holds", "refuted", "undecided")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = [INTRODUCTION.format(count=len(rows), said=said)]
    lines += ["| " + " | ".join(("claim", *COLUMNS[1:])) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = cells_of(row)
        cells["claim"] = f"{row['claim']}. {row['title']}"
        cells["here"] += f" {row['unit']}"
        cells["verdict"] = f"**{row['verdict']}**"
        lines.append("| " + " | ".join(cells[name].replace("|", "\\|") for name in COLUMNS) + " |")
    lines += ["", "## Rules, models and checks", ""]
    lines += [*(f"- {_detail(row)}" for row in rows), *_untested(rows)]
    return "\n".join(lines) + "\n"


def _untested(rows: Sequence[Row]) -> list[str]:
    """Return the table of the claims that have no file, and why; none on a board without rows."""
    known = read_toml(FOLDER / UNTESTED)["claim"]
    if not rows or not known:
        return []
    lines = ["", "## Not tested at this size", "", "| claim | source | there | why not |", "|---|---|---|---|"]
    return lines + [f"| {one['title']} | {one['source']} | {one['there']} | {one['why']} |" for one in known]


def cells_of(row: Row) -> dict[str, str]:
    """Return the columns of a row as text."""
    return {
        "claim": str(row["claim"]),
        "source": str(row["source"]),
        "there": str(row["there"]),
        "here": _span(row),
        "verdict": str(row["verdict"]),
        "power": f"{row['power']:.0%}",
        "minutes": f"{row['minutes']:.1f}" + (f" of {row['registered']:g}" if "registered" in row else ""),
    }


def _span(row: Row) -> str:
    """Return the estimate with its interval, where it has one that is not exact."""
    here, low, high = (row[name] for name in ("here", "low", "high"))
    if here is None:
        return "-"
    return f"{here:.3g}" + ("" if low is None or low == high else f" ({low:.3g} ... {high:.3g})")


def _detail(row: Row) -> str:
    """Return one line on a claim: the rule, on what it was measured, and its checks."""
    text = f"**{row['claim']}**: {row['rule']} ({row['unit']}); {row['model']} on {row['data']}, "
    text += f"{row['runs']} runs, seeds: {row['seeds']}"
    text += f", lost: {row['lost']}" if row["lost"] else ""
    text += "; took longer than registered" if row["minutes"] > row.get("registered", math.inf) else ""
    text += "; a best rate lies at the edge of what was tried" if row["at_edge"] else ""
    if row["verdict"] != "undecided" and row["robustness"]:
        names = {BY_SEED: "without any one seed", BY_MARGIN: "at a stricter margin"}
        text += "; " + ", ".join(
            f"{names.get(check, f'with {check}')}: {verdict}" for check, verdict in row["robustness"].items()
        )
    return f"{text}; {row['note']}" if row["note"] else text


def _number(value: float) -> float | None:
    """Return a number with six digits; None where there is none, since JSON has no such number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


INTRODUCTION = """\
# Published claims about LoRA, held against small models

{count} claims: {said}.

What is measured and what would hold, refute or leave a claim undecided was registered in
[`src/loralab/studies/claims`](../../src/loralab/studies/claims) before the runs; a file
that changed after its run is refused. `loralab study claims` runs them, `loralab study claims 12` one of them, and
`loralab report docs/claims` writes this page again from `board.json`; nothing is trained for it.

"here" is an estimate with its 95 % interval, by the rule that stands below the table. Of a claim of a
direction, "holds" is an interval beyond the threshold, "refuted" one that stays below threshold and margin
together. Of a claim of equality, "holds" is an interval within the margin, "refuted" one outside of it. Power
is the chance that this design, with the noise that it has met, decides an effect as large as the margin.
Minutes are those of all runs that a claim needs, also where another claim has made them, of those that were registered.
A claim that was refuted is run again with other seeds and, where its file says so, on other data.
"""
