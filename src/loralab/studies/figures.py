"""Charts -> Vega-Lite in a language: hover shows values, the legend toggles arms.

Colours and fonts are the page's (report.html.j2 sets them for dark and for light).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from loralab.studies.message import Chart
from loralab.studies.wording import say

Rows = Sequence[Mapping[str, Any]]
HEIGHT = 260
ROW = 34  # of a chart whose arms stand below each other
INTERVAL = ("value", "low", "high")
WIDTH = 620  # of files; on the page a chart is as wide as its column


def drawn(chart: Chart, language: str) -> dict[str, Any]:
    """Return a chart as Vega-Lite, its texts in a language."""
    rows = [
        {k: v if isinstance(v, int | float) or v is None else say(v, language) for k, v in row.items()}
        for row in chart.rows
    ]
    titles = {name: say(own, language) for name in ("x", "y", "by") if (own := getattr(chart, name)) is not None}
    found = KINDS[chart.kind](rows, **titles, **chart.options)
    if "height" not in found.to_dict(validate=False):
        found = found.properties(height=HEIGHT)
    return dict(found.properties(width=WIDTH).to_dict())


def intervals(
    rows: Rows, *, x: str, y: str, log: bool = False, chance: float | None = None, percent: bool = False
) -> Any:
    """Draw a value with its interval for each arm; arms that are names stand below each other.

    Args:
        rows: {"arm", "value", "low", "high"}, and "x" where the arms are numbers.
        log: the numbers stand on a scale of powers of two.
        chance: a level to draw across.
    """
    numbered, order = all("x" in row for row in rows), _names(rows, "arm")
    along, axis = ("y", _value(alt.Y, y, percent)) if numbered else ("x", _value(alt.X, y, percent))
    if numbered:
        scale = alt.Scale(type="log", base=2) if log else alt.Scale(zero=False)
        ticks = alt.Axis(values=sorted({row["x"] for row in rows}), format="~s")
        base = alt.Chart(_data(rows)).encode(x=alt.X("x:Q", title=x, scale=scale, axis=ticks))
    else:
        base = alt.Chart(_data(rows)).encode(y=_arms(order, x))
    value, tip = {along: axis("value")}, _tip(INTERVAL)
    found = alt.layer(
        base.mark_rule(strokeWidth=2).encode(**{along: axis("low"), f"{along}2": "high:Q"}, tooltip=tip),
        *([base.mark_line(opacity=0.5).encode(**value)] if numbered else []),
        base.mark_point(filled=True, size=70, opacity=1).encode(**value, tooltip=tip),
        *_across(chance, upright=not numbered),
    )
    return found if numbered else found.properties(height=ROW * len(order))


def lines(
    rows: Rows,
    *,
    x: str,
    y: str,
    by: str,
    log_x: bool = False,
    log_y: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> Any:
    """Draw curves: {"arm", "x", "y"}, one line for each arm."""
    chosen = alt.selection_point(fields=["arm"], bind="legend")
    scale = alt.Scale(type="log") if log_x else alt.Scale(zero=False, nice=False)
    place = alt.X("x:Q", title=x, scale=scale)
    axis = _value(alt.Y, y, percent, log=log_y)
    colour = alt.Color("arm:N", title=by, sort=_names(rows, "arm"))
    faint = alt.condition(chosen, alt.value(1), alt.value(0.08))
    base = alt.Chart(_data(rows)).encode(x=place, color=colour)
    line = base.mark_line(point=len(rows) < 80).encode(y=axis("y"), opacity=faint, tooltip=_tip(("x", "y")))
    return alt.layer(line.add_params(chosen), *_across(chance))


def bars(rows: Rows, *, x: str, y: str, by: str | None = None, percent: bool = False) -> Any:
    """Draw bars: {"arm", "value"} from top to bottom, and "group" where several belong together."""
    order, groups = _names(rows, "arm"), _names(rows, "group") if by else [""]
    encoding: dict[str, Any] = {
        "y": _arms(order, x),
        "x": _value(alt.X, y, percent, zero=True)("value"),
        "tooltip": [*(["group:N"] if by else []), *_tip(("value",))],
    }
    if by is not None:
        encoding["color"] = alt.Color("group:N", title=by, sort=groups)
        encoding["yOffset"] = alt.YOffset("group:N", sort=groups)
    height = len(order) * max(ROW, 16 * len(groups) + 8)
    return alt.Chart(_data(rows)).mark_bar().encode(**encoding).properties(height=height)


def heat(
    rows: Rows, *, x: str, y: str, by: str, numbers: bool = True, digits: str = ".2f", height: int = HEIGHT
) -> Any:
    """Draw a heat map: {"x", "y", "value"}; rows and columns in the order given."""
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("x:O", title=x, sort=_names(rows, "x"), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:O", title=y, sort=_names(rows, "y"), axis=alt.Axis(labelLimit=150)),
        tooltip=["x:N", "y:N", alt.Tooltip("value:Q", format=".4g")],
    )
    cells = base.mark_rect().encode(color=alt.Color("value:Q", title=by, scale=alt.Scale(scheme="viridis")))
    values = [float(row["value"]) for row in rows if row["value"] is not None] or [0.0]
    middle = (min(values) + max(values)) / 2
    text = base.mark_text(fontSize=11).encode(
        text=alt.Text("value:Q", format=digits),
        color=alt.condition(f"datum.value > {middle}", alt.value("#111"), alt.value("#fff")),
    )
    return alt.layer(cells, *([text] if numbers else [])).properties(height=height)


def scatter(rows: Rows, *, x: str, y: str) -> Any:
    """Draw named points, such as cost against score: {"arm", "x", "y"}."""
    across = alt.X("x:Q", title=x, scale=alt.Scale(zero=False, padding=30))
    base = alt.Chart(_data(rows)).encode(x=across, y=_value(alt.Y, y, False)("y"), tooltip=_tip(("x", "y")))
    names = base.mark_text(dy=-11, fontSize=11).encode(text="arm:N")
    return alt.layer(base.mark_point(filled=True, size=80, opacity=1), names)


KINDS: Mapping[str, Callable[..., Any]] = {kind.__name__: kind for kind in (intervals, lines, bars, heat, scatter)}


def _data(rows: Rows) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def _names(rows: Rows, column: str) -> list[Any]:
    """Return the values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def _arms(order: Sequence[str], title: str) -> alt.Y:
    """Encode names from top to bottom, in their order."""
    axis = alt.Axis(labelLimit=190, titleAngle=0, titleAlign="right", titleX=-8, titleY=-10)
    return alt.Y("arm:N", title=title, sort=list(order), axis=axis)


def _value(channel: Any, text: str, percent: bool, *, log: bool = False, zero: bool = False) -> Callable[[str], Any]:
    """Return the function that encodes a column on the axis of values."""
    scale = alt.Scale(type="log") if log else alt.Scale(zero=zero)
    axis = alt.Axis(format=".0%") if percent else alt.Axis()
    return lambda column: channel(f"{column}:Q", title=text, scale=scale, axis=axis)


def _tip(columns: Sequence[str]) -> list[Any]:
    return ["arm:N", *(alt.Tooltip(f"{column}:Q", format=".4g") for column in columns)]


def _across(level: float | None, *, upright: bool = False) -> list[alt.Chart]:
    if level is None:
        return []
    rule = alt.Chart(alt.InlineData(values=[{"level": level}])).mark_rule(strokeDash=[6, 4], opacity=0.7)
    return [rule.encode(x="level:Q") if upright else rule.encode(y="level:Q")]
