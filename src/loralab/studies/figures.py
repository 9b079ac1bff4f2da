"""Rows -> charts, as Vega-Lite in both languages: hover shows values, the legend toggles arms.

Colours and fonts are the page's (report.html.j2 sets them for dark and for light).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from loralab.studies.study import LANGUAGES, Figure, Text

Rows = Sequence[Mapping[str, Any]]
HEIGHT = 260
ROW = 34  # of a chart whose arms stand below each other
INTERVAL = ("value", "low", "high")
WIDTH = 620  # of files; on the page a chart is as wide as its column


def intervals(
    name: str,
    title: Text,
    rows: Rows,
    *,
    x: Text,
    y: Text,
    log: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> Figure:
    """A value with its interval for each arm; arms that are names stand below each other.

    Args:
        rows: {"arm", "value", "low", "high"}, and "x" where the arms are numbers.
        log: the numbers stand on a scale of powers of two.
        chance: a level to draw across.
    """
    if all("x" in row for row in rows):
        return _figure(name, title, lambda code: _numbered(rows, code, x, y, log, chance, percent))
    return _figure(name, title, lambda code: _named(rows, code, x, y, chance, percent))


def _numbered(rows: Rows, language: str, x: Text, y: Text, log: bool, chance: float | None, percent: bool) -> Any:
    """Arms that are numbers, from left to right."""
    base = alt.Chart(_data(rows))
    axis = _value(alt.Y, y, language, percent)
    scale = alt.Scale(type="log", base=2) if log else alt.Scale(zero=False)
    ticks = sorted({row["x"] for row in rows})
    place = alt.X("x:Q", title=x.said(language), scale=scale, axis=alt.Axis(values=ticks, format="~s"))
    return alt.layer(
        base.mark_rule(strokeWidth=2).encode(x=place, y=axis("low"), y2="high:Q", tooltip=_tip(INTERVAL)),
        base.mark_line(opacity=0.5).encode(x=place, y=axis("value")),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=place, y=axis("value"), tooltip=_tip(INTERVAL)),
        *_across(chance),
    )


def _named(rows: Rows, language: str, x: Text, y: Text, chance: float | None, percent: bool) -> Any:
    """Arms that are names, from top to bottom."""
    order = list(dict.fromkeys(row["arm"] for row in rows))
    base = alt.Chart(_data(rows)).encode(y=_arms(order, x, language))
    axis = _value(alt.X, y, language, percent)
    return alt.layer(
        base.mark_rule(strokeWidth=2).encode(x=axis("low"), x2="high:Q", tooltip=_tip(INTERVAL)),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=axis("value"), tooltip=_tip(INTERVAL)),
        *_across(chance, upright=True),
    ).properties(height=ROW * len(order))


def lines(
    name: str,
    title: Text,
    rows: Rows,
    *,
    x: Text,
    y: Text,
    arm: Text,
    log_x: bool = False,
    log_y: bool = False,
    chance: float | None = None,
    percent: bool = False,
    band: bool = False,
) -> Figure:
    """Curves: {"arm", "x", "y"}, one line for each arm; with `band` also "low" and "high"."""

    def build(language: str) -> Any:
        chosen = alt.selection_point(fields=["arm"], bind="legend")
        scale = alt.Scale(type="log") if log_x else alt.Scale(zero=False, nice=False)
        place = alt.X("x:Q", title=x.said(language), scale=scale)
        axis = _value(alt.Y, y, language, percent, log=log_y)
        order = list(dict.fromkeys(row["arm"] for row in rows))
        colour = alt.Color("arm:N", title=arm.said(language), sort=order)
        faint = alt.condition(chosen, alt.value(1), alt.value(0.08))
        tip = ["arm:N", alt.Tooltip("x:Q", format=".4g"), alt.Tooltip("y:Q", format=".4g")]
        base = alt.Chart(_data(rows))
        drawn: list[Any] = []
        if band:
            drawn.append(base.mark_area(opacity=0.15).encode(x=place, y=axis("low"), y2="high:Q", color=colour))
        line = base.mark_line(point=len(rows) < 80).encode(
            x=place, y=axis("y"), color=colour, opacity=faint, tooltip=tip
        )
        return alt.layer(*drawn, line.add_params(chosen), *_across(chance))

    return _figure(name, title, build)


def bars(
    name: str, title: Text, rows: Rows, *, x: Text, y: Text, group: Text | None = None, percent: bool = False
) -> Figure:
    """Bars: {"arm", "value"} from top to bottom, and "group" where several belong together."""
    order = list(dict.fromkeys(row["arm"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows)) if group else [""]

    def build(language: str) -> Any:
        encoding: dict[str, Any] = {
            "y": _arms(order, x, language),
            "x": _value(alt.X, y, language, percent, zero=True)("value"),
            "tooltip": [*(["group:N"] if group else []), *_tip(("value",))],
        }
        if group is not None:
            encoding["color"] = alt.Color("group:N", title=group.said(language), sort=groups)
            encoding["yOffset"] = alt.YOffset("group:N", sort=groups)
        height = len(order) * max(ROW, 16 * len(groups) + 8)
        return alt.Chart(_data(rows)).mark_bar().encode(**encoding).properties(height=height)

    return _figure(name, title, build)


def heat(
    name: str,
    title: Text,
    rows: Rows,
    *,
    x: Text,
    y: Text,
    value: Text,
    numbers: bool = True,
    digits: str = ".2f",
    height: int = HEIGHT,
) -> Figure:
    """A heat map: {"x", "y", "value"}; rows and columns in the order given."""

    def build(language: str) -> Any:
        columns = list(dict.fromkeys(row["x"] for row in rows))
        lines_ = list(dict.fromkeys(row["y"] for row in rows))
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("x:O", title=x.said(language), sort=columns, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("y:O", title=y.said(language), sort=lines_, axis=alt.Axis(labelLimit=150)),
            tooltip=["x:N", "y:N", alt.Tooltip("value:Q", format=".4g")],
        )
        cells = base.mark_rect().encode(
            color=alt.Color("value:Q", title=value.said(language), scale=alt.Scale(scheme="viridis"))
        )
        middle = _middle([float(row["value"]) for row in rows if row["value"] is not None])
        text = base.mark_text(fontSize=11).encode(
            text=alt.Text("value:Q", format=digits),
            color=alt.condition(f"datum.value > {middle}", alt.value("#111"), alt.value("#fff")),
        )
        return alt.layer(cells, *([text] if numbers else [])).properties(height=height)

    return _figure(name, title, build)


def scatter(
    name: str, title: Text, rows: Rows, *, x: Text, y: Text, log_x: bool = False, percent: bool = False
) -> Figure:
    """Named points, such as cost against score: {"arm", "x", "y"}."""

    def build(language: str) -> Any:
        scale = alt.Scale(type="log") if log_x else alt.Scale(zero=False, padding=30)
        base = alt.Chart(_data(rows)).encode(
            x=alt.X("x:Q", title=x.said(language), scale=scale),
            y=_value(alt.Y, y, language, percent)("y"),
            tooltip=["arm:N", alt.Tooltip("x:Q", format=".4g"), alt.Tooltip("y:Q", format=".4g")],
        )
        names = base.mark_text(dy=-11, fontSize=11).encode(text="arm:N")
        return alt.layer(base.mark_point(filled=True, size=80, opacity=1), names)

    return _figure(name, title, build)


def _figure(name: str, title: Text, build: Callable[[str], Any]) -> Figure:
    specs = {}
    for language in LANGUAGES:
        chart = build(language)
        if "height" not in chart.to_dict(validate=False):
            chart = chart.properties(height=HEIGHT)
        specs[language] = chart.properties(width=WIDTH).to_dict()
    return Figure(name=name, title=title, specs=specs)


def _data(rows: Rows) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def _arms(order: Sequence[str], title: Text, language: str) -> alt.Y:
    """Names from top to bottom, in their order."""
    axis = alt.Axis(labelLimit=190, titleAngle=0, titleAlign="right", titleX=-8, titleY=-10)
    return alt.Y("arm:N", title=title.said(language), sort=list(order), axis=axis)


def _value(
    channel: Any, text: Text, language: str, percent: bool, *, log: bool = False, zero: bool = False
) -> Callable[[str], Any]:
    """What makes an encoding of the axis of values from a column's name."""
    scale = alt.Scale(type="log") if log else alt.Scale(zero=zero)
    axis = alt.Axis(format=".0%") if percent else alt.Axis()
    return lambda column: channel(f"{column}:Q", title=text.said(language), scale=scale, axis=axis)


def _tip(columns: Sequence[str]) -> list[Any]:
    """What hovering shows."""
    return ["arm:N", *(alt.Tooltip(f"{column}:Q", format=".4g") for column in columns)]


def _across(level: float | None, *, upright: bool = False) -> list[alt.Chart]:
    """A dashed line across the chart."""
    if level is None:
        return []
    rule = alt.Chart(alt.InlineData(values=[{"level": level}])).mark_rule(strokeDash=[6, 4], opacity=0.7)
    return [rule.encode(x="level:Q") if upright else rule.encode(y="level:Q")]


def _middle(values: Sequence[float]) -> float:
    return (min(values) + max(values)) / 2 if values else 0.0
