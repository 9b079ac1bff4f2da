"""The first page recommends what was trained as a whole; the default stands where nothing else is shown."""

import shlex
from collections.abc import Sequence
from dataclasses import replace

from studies.conftest import keys_in, message_in, messages_in, planted

from loralab.studies.advice import Advice, advised, grouped
from loralab.studies.message import Message
from loralab.studies.section import Section, section
from loralab.studies.study import Arm, Record, StudySetup
from loralab.studies.wording import LANGUAGES, say

FIELDS = {"max_steps": 60, "batch_size": 16}
GOOD, FAIR, CHANCE = [1.0] * 180 + [0.0] * 20, [1.0] * 140 + [0.0] * 60, [1.0, 0.0] * 100


def setup(study: str, **fields: object) -> StudySetup:
    return StudySetup(study=study, model="m", data="d", fields={**FIELDS, **fields}, rows={"test": 200})


def base() -> list[Record]:
    return [replace(r, arm=Arm(name="base", plain=True)) for r in planted("base", CHANCE, seeds=1)]


def sized(records: Sequence[Record], parameters: float) -> list[Record]:
    return [replace(record, numbers={**record.numbers, "parameters": parameters}) for record in records]


def first_page(*sections: Section) -> Advice:
    (group,) = grouped(sections)
    advice = advised(group)
    for language in LANGUAGES:
        assert all(say(text, language) for text in messages_in(advice.sentence))
    return advice


def test_an_arm_that_is_better_is_recommended_beside_the_default() -> None:
    records = [*base(), *planted("r=8", FAIR, rank=8), *planted("r=16", GOOD, rank=16)]
    found = first_page(section("rank", setup("rank"), records))
    assert message_in(found.sentence, "page.whole").values["arm"] == "r=16"
    assert message_in(found.sentence, "page.default").values["arm"] == "r=8"
    assert message_in(found.sentence, "contrast.better").values["b"] == "r=8"
    words = shlex.split(found.command)
    assert words[words.index("--rank") + 1] == "16"
    assert float(words[words.index("--learning-rate") + 1]) == records[-1].rate


def test_the_default_stands_where_nothing_is_decided() -> None:
    near = [1.0] * 143 + [0.0] * 57
    records = [*base(), *planted("r=8", near[::-1], rank=8), *planted("r=16", near, rank=16)]
    found = first_page(section("rank", setup("rank"), records))
    assert message_in(found.sentence, "page.whole").values["arm"] == "r=8"
    assert "page.default_stands" in keys_in(found.sentence)


def test_as_good_at_less_cost_is_a_reason() -> None:
    own = [*sized(planted("r=8", GOOD, rank=8), 200), *sized(planted("r=2", GOOD, rank=2), 50)]
    found = first_page(section("rank", setup("rank"), [*base(), *own]))
    assert message_in(found.sentence, "page.whole").values["arm"] == "r=2"
    assert message_in(found.sentence, "contrast.equivalent").values["b"] == "r=8"


def test_studies_on_the_same_rows_are_joined_and_what_was_not_trained_is_a_candidate() -> None:
    ranks = section("rank", setup("rank"), [*base(), *planted("r=8", FAIR, rank=8), *planted("r=16", FAIR, rank=16)])
    places = section("targets", setup("targets"), [*base(), *planted("mlp r=8", GOOD, rank=8, target_modules="mlp")])
    elsewhere = section("grid", setup("grid", max_steps=9), [*base(), *planted("x", GOOD, rank=4, use_rslora=True)])
    elsewhere = replace(elsewhere, answer=replace(elsewhere.answer, advice={"rank": 4}))
    ranks = replace(ranks, answer=replace(ranks.answer, advice={"rank": 16}))
    found = first_page(ranks, places, elsewhere)
    assert message_in(found.sentence, "page.whole").values["arm"] == "mlp r=8 (Q4)"
    assert message_in(found.sentence, "page.default").values["arm"] == "r=8 (Q2)"
    assert [(name, shown) for name, _, shown, _ in found.candidates] == [("rank", "rank = 16"), ("grid", "rank = 4")]
    assert shlex.split(found.search) == ["loralab", "recommend", "--model", "m", "--data", "d"]
    words = shlex.split(found.command)
    assert words[words.index("--target-modules") + 1] == "mlp"


def test_nothing_is_recommended_where_no_arm_beats_the_base() -> None:
    records = [*base(), *planted("r=8", CHANCE, rank=8), *planted("r=16", CHANCE, rank=16)]
    found = first_page(section("rank", setup("rank"), records))
    assert found.sentence == Message("ranking.nothing")
    assert found.command == ""


def test_what_is_not_decided_is_not_recommended_and_says_what_would_decide_it() -> None:
    """Let one seed tell too little: the default stays, and a command with more seeds is given first."""
    draw = [*base(), *planted("r=8", GOOD, seeds=1, rank=8), *planted("r=16", GOOD[::-1], seeds=1, rank=16)]
    found = first_page(section("rank", replace(setup("rank"), seeds=1, quick=True), draw, "here"))
    assert (found.verdict, found.title.key) == ("undecided", "page.not_decided")
    assert "page.kept" in keys_in(found.sentence)
    words = shlex.split(found.decide)
    assert "--quick" not in words
    assert int(words[words.index("--seeds-max") + 1]) > 1
    assert words[words.index("--output-dir") + 1] == "here-longer"
    assert message_in(found.sentence, "page.whole").values.keys() >= {"regret", "probability"}


def test_arms_that_say_the_commonest_label_are_not_recommended() -> None:
    """Let the untrained model be worse still: labels without a meaning have a commonest one all the same."""
    records = [*base(), *planted("r=8", FAIR, rank=8), *planted("r=16", FAIR, rank=16)]
    records = [replace(r, items={**r.items, "majority": FAIR}) for r in records if r.arm.name != "base"] + base()
    shown = section("rank", setup("rank"), records)
    assert shown.answer.ranking.recommended is None
    assert "ranking.nothing_learnt" in keys_in(shown.answer.sentence)
    assert not any(finding.holds for finding in shown.answer.findings)
    better = [replace(r, items={**r.items, "majority": [1.0, 0.0] * 100}) for r in records if r.arm.name != "base"]
    assert section("rank", setup("rank"), [*base(), *better]).answer.ranking.recommended is not None
