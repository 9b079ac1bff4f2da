"""Claims of the papers on LoRA and adapters beside the verdicts of a study: which hold here."""

from collections.abc import Collection, Sequence

from loralab.studies.compare import Comparison
from loralab.studies.contrast import Contrast
from loralab.studies.measures.passes import MERGED, UNMERGED
from loralab.studies.message import Message, Table, table
from loralab.studies.ranking import FLOOR
from loralab.studies.readings.latencies import Latencies
from loralab.studies.study import NOT_MEASURED
from loralab.studies.timing import change

Row = dict[str, Message | None]


def published_table(
    found: Comparison, times: Latencies, lora: str | None, family: Collection[str], others: Sequence[Row] = ()
) -> Table:
    """Return what the papers report, and whether it holds here.

    Args:
        lora: LoRA's arm of the larger budget.
        family: all arms of that budget.
        others: rows of further claims, such as those on forgetting.
    """
    scores = _scores(found, lora, [name for name in family if name != lora])
    return table("table.published", [*_passes(times), *scores, *others], "claim", "here", "numbers")


def _passes(times: Latencies) -> list[Row]:
    """Return the orders of LoRA's Table 1: merged adds nothing; adapters cost, most so for a single short row."""
    variants = {variant.partition(" ")[0]: variant for variant, _ in reversed(times.beside_base())}
    lora, heavy, light = ((variants.get(method, ""), UNMERGED) for method in ("lora", "houlsby", "pfeiffer"))
    first = times.shapes[:1]
    return [
        _timed("merged_is_free", [times.over((lora[0], MERGED), shape) for shape in times.shapes], {"equivalent"}),
        _timed("unmerged_costs", [times.over(lora, shape) for shape in first], {"worse"}),
        _timed("light_adapter_costs", [times.over(light, shape) for shape in first], {"worse"}),
        _timed("heavy_adapter_costs_more", [times.over(heavy, s, light) for s in first], {"worse", "equivalent"}),
        _timed("share_shrinks", [times.growth(heavy)], {"better"}),
    ]


def _timed(name: str, overheads: Sequence[Contrast | None], expected: Collection[str]) -> Row:
    known = [over for over in overheads if over is not None]
    numbers = Message("join.commas", parts=[change(over) for over in known]) if known else None
    here = holds_here([over.verdict for over in known], expected)
    return {"claim": Message(f"methods.{name}"), "here": here, "numbers": numbers}


def _scores(found: Comparison, lora: str | None, rivals: Sequence[str]) -> list[Row]:
    """Return that every method learns, and that LoRA is no worse than the others at an equal budget."""
    ranking, rows = found.ranking, list[Row]()
    if FLOOR in ranking.means:
        verdicts = [ranking.contrast(name, FLOOR).verdict for name in found.arms]
        numbers = Message("methods.better_of_all", better=verdicts.count("better"), all=len(verdicts))
        here = holds_here(verdicts, {"better"})
        rows.append({"claim": Message("methods.all_learn"), "here": here, "numbers": numbers})
    for rival in rivals if lora is not None else ():
        contrast = ranking.contrast(str(lora), rival)
        claim = Message("methods.lora_no_worse", lora=lora, rival=rival)
        here = holds_here([contrast.verdict], {"better", "equivalent"})
        rows.append({"claim": claim, "here": here, "numbers": found.metric.span(contrast.low, contrast.high)})
    return rows


def holds_here(verdicts: Sequence[str], expected: Collection[str]) -> Message:
    """Tell whether all verdicts are among those that a published claim expects."""
    if not verdicts:
        return NOT_MEASURED
    others = set(verdicts) - set(expected)
    return Message("claim.holds" if not others else "claim.undecided" if others == {"undecided"} else "claim.fails")
