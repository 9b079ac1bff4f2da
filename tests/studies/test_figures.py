"""Every kind of chart is drawn in both languages."""

import vl_convert

from loralab.studies.figures import KINDS, drawn
from loralab.studies.message import Chart, Message
from loralab.studies.wording import LANGUAGES, say

ROWS = [
    {"arm": arm, "x": i, "y": i + 1, "value": i, "low": i - 1, "high": i + 1, "group": arm}
    for arm in ("p", "q")
    for i in (1, 2, 4)
]
NAMED = [{key: value for key, value in row.items() if key != "x"} for row in ROWS]


def test_every_kind_of_chart_is_drawn_in_both_languages() -> None:
    axis, arm = Message("column.rank"), Message("column.arm")
    title = Message("table.scores")
    charts = [
        Chart("intervals", "i", title, ROWS, axis, axis, options={"log": True, "chance": 1.5}),
        Chart("intervals", "n", title, NAMED, arm, axis, options={"percent": True}),
        Chart("lines", "l", title, ROWS, axis, axis, arm, {"log_x": True}),
        Chart("bars", "b", title, ROWS, arm, axis, arm),
        Chart("heat", "h", title, ROWS, axis, arm, arm),
        Chart("scatter", "s", title, ROWS, arm, axis),
    ]
    assert {chart.kind for chart in charts} == set(KINDS)
    for chart in charts:
        for language in LANGUAGES:
            assert say(chart.x, language) in vl_convert.vegalite_to_svg(drawn(chart, language))


def test_a_name_that_is_a_message_is_drawn_in_the_language_of_the_page() -> None:
    rows = [{"arm": Message("metric.accuracy"), "value": 1.0}]
    chart = Chart("bars", "b", Message("table.scores"), rows, Message("column.arm"), Message("column.rank"))
    for language in LANGUAGES:
        assert say(Message("metric.accuracy"), language) in str(drawn(chart, language))
