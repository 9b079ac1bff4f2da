"""The search for a configuration says what was counted, and recommends over the default only what is likely better."""

from dataclasses import replace

from studies.conftest import assert_it_renders, keys_in, message_in, planted

from loralab.studies.halving import DEFAULT, ROUNDS
from loralab.studies.questions import recommend
from loralab.studies.study import DIVERGED, Arm, Record, StudySetup

SETUP = StudySetup(study="recommend", model="m", data="d", fields={"max_steps": 60}, values=("9", "60"))
GOOD, FAIR, CHANCE = [1.0] * 180 + [0.0] * 20, [1.0] * 140 + [0.0] * 60, [1.0, 0.0] * 100


def whole(name: str, scores: list[float], validation: list[float] | None = None, seeds: int = 3) -> list[Record]:
    """Plant runs to the end, whose validation rows score as the test rows do, or otherwise."""
    own = validation or scores
    return [
        replace(
            record,
            items={**record.items, "validation": own},
            numbers={**record.numbers, "validation_score": sum(own) / len(own)},
        )
        for record in planted(name, scores, seeds=seeds, learning_rate=1e-3)
    ]


def base() -> list[Record]:
    return [replace(record, arm=Arm(name="base", plain=True)) for record in planted("base", CHANCE, seeds=1)]


def short(name: str, number: int, loss: float) -> Record:
    lost = loss == float("inf")
    numbers = {"round": float(number)} if lost else {"round": float(number), "validation_loss": loss}
    return Record(arm=Arm(name=name), seed=0, status=DIVERGED if lost else "done", numbers=numbers)


def test_a_better_configuration_is_shown_beside_the_default() -> None:
    rounds = [short("a", 1, 0.5), short("b", 1, 0.6), short("c", 1, float("inf")), short("a", 2, 0.4)]
    answer = recommend.conclude([*rounds, *base(), *whole(DEFAULT, FAIR), *whole("a", GOOD)], SETUP)
    assert answer.ranking.recommended == "a"
    assert answer.advice == {"method": "lora", "learning_rate": 1e-3}
    assert message_in(answer.sentence, "recommend.of").values["count"] == len({r.arm.name for r in rounds})
    reached = message_in(answer.sentence, "recommend.default").values["score"].values["value"]
    assert abs(reached - 0.7) < 0.01
    claim = message_in(answer.sentence, "contrast.better").values
    assert (claim["a"], claim["b"]) == ("a", DEFAULT)
    assert "recommend.extrapolated" not in keys_in(answer.sentence)
    assert_it_renders(answer, "recommend")


def test_candidates_stand_by_how_far_they_went() -> None:
    rounds = [short("c", 1, float("inf")), short("b", 1, 0.3), short("a", 1, 0.5), short("a", 2, 0.4)]
    rows = recommend.conclude([*rounds, *whole(DEFAULT, FAIR)], SETUP).tables[-1].rows
    assert [row["arm"] for row in rows] == ["a", "b", "c"]
    assert rows[0] == {"arm": "a", **{f"round_{n}": loss for n, loss in zip(range(1, ROUNDS), (0.5, 0.4), strict=True)}}
    assert rows[2]["round_1"].key == "recommend.diverged"


def test_validation_rows_choose_and_the_default_stays_where_nothing_beats_it() -> None:
    records = [*base(), *whole(DEFAULT, FAIR, GOOD), *whole("a", GOOD, FAIR)]
    answer = recommend.conclude(records, SETUP)
    assert answer.ranking.recommended == DEFAULT
    assert "recommend.default" not in keys_in(answer.sentence)


def test_nothing_is_recommended_where_nothing_was_learnt() -> None:
    answer = recommend.conclude([*base(), *whole(DEFAULT, CHANCE), *whole("a", CHANCE)], SETUP)
    assert answer.ranking.recommended is None
    assert answer.advice == {}
    assert "ranking.nothing" in keys_in(answer.sentence)


def test_shorter_runs_are_called_an_extrapolation() -> None:
    setup = replace(SETUP, fields={"max_steps": 30})
    answer = recommend.conclude(whole(DEFAULT, GOOD), setup)
    assert message_in(answer.sentence, "recommend.extrapolated").values == {"steps": 30, "whole": 60}


def test_a_search_without_a_whole_run_says_so() -> None:
    answer = recommend.conclude([short("a", 1, 0.5)], SETUP)
    assert answer.sentence.key == "recommend.nothing"
    assert len(answer.tables) == 1
    assert_it_renders(answer, "recommend")
