"""A learning rate is chosen that other seeds bear out, and the smallest of those that are as good."""

import math
from collections.abc import Callable

from loralab.studies.rates import RATIO, Run, grid, next_runs, rounded, settled, with_rate
from loralab.studies.search import tune
from loralab.studies.study import DIVERGED, Arm, Record, StudySetup, Trial

SETUP = StudySetup(
    study="rank", model="m", data="d", fields={"max_steps": 30}, rates=(0.1, 1.0, 10.0), rows={"validation": 50}
)
QUICK = StudySetup(study="rank", model="m", data="d", fields={"max_steps": 30}, rates=(1.0, 3.0), quick=True)
ARM = Arm(name="r=8", fields={"method": "lora", "rank": 8})
USUAL = 5e-4


def losses(of: Callable[[float, int], float], noise: float = 0.0) -> Callable[[Trial], Record]:
    """Fake runs whose validation loss follows from the rate, as a multiple of the usual one, and the seed."""

    def obtain(trial: Trial) -> Record:
        loss = of(trial.arm.fields["learning_rate"] / USUAL, trial.seed)
        if math.isinf(loss):
            return Record(arm=trial.arm, seed=trial.seed, status=DIVERGED)
        rows = [loss + noise * (-1) ** (n + round(math.log(trial.arm.fields["learning_rate"]))) for n in range(50)]
        return Record(
            arm=trial.arm, seed=trial.seed, numbers={"validation_loss": loss}, items={"validation_loss": rows}
        )

    return obtain


def bowl(best: float) -> Callable[[float, int], float]:
    return lambda factor, seed: 1 + abs(math.log(factor / best))


def test_rules_ask_for_the_grid_at_once_then_for_its_edge_for_whole_runs_and_for_each_seed() -> None:
    measure, first, runs, asked = losses(bowl(10.0)), grid(SETUP, ARM), dict[Run, Record](), list[list[Run]]()
    while step := next_runs(runs, first, 2):
        asked.append(step)
        for run in step:
            runs[run] = measure(Trial(measure="m", setup=SETUP, arm=with_rate(ARM, run.rate), seed=run.seed))
    edge = rounded(10 * USUAL * RATIO)
    assert asked[0] == [Run(rate, short=True) for rate in first]
    assert asked[1:] == [[Run(edge, short=True)], [Run(10 * USUAL), Run(edge)], [Run(10 * USUAL, seed=1)]]
    assert settled(runs, 2) == (10 * USUAL, None)


def test_a_best_rate_at_the_edge_extends_the_grid() -> None:
    for setup in (SETUP, QUICK):
        found = tune(setup, ARM, losses(bowl(30.0)), "m")
        assert found.rate is not None
        assert found.rate / USUAL > max(setup.rates)
        assert len(found.rates) > len(setup.rates)


def test_a_best_rate_that_still_lies_at_the_edge_is_said_to() -> None:
    assert tune(QUICK, ARM, losses(bowl(1e6)), "m").at_edge
    assert not tune(SETUP, ARM, losses(bowl(1.0)), "m").at_edge


def test_of_rates_within_noise_the_smallest_is_taken() -> None:
    def flat(factor: float, seed: int) -> float:
        return {0.1: 2.0, 1.0: 1.001, 10.0: 1.0}.get(round(factor, 1), 3.0)

    clear = tune(SETUP, ARM, losses(flat), "m")
    noisy = tune(SETUP, ARM, losses(flat, noise=0.5), "m")
    assert (clear.rate, noisy.rate) == (10 * USUAL, USUAL)


def test_a_rate_that_another_seed_does_not_bear_out_is_left() -> None:
    def unstable(factor: float, seed: int) -> float:
        if factor > 5 and seed == 1:
            return 1.9
        return {0.1: 2.0, 1.0: 1.3, 10.0: 1.0}.get(round(factor, 1), 3.0)

    assert tune(SETUP, ARM, losses(unstable), "m").rate == USUAL
    assert tune(SETUP, ARM, losses(lambda f, s: math.inf if f > 5 and s else unstable(f, 0)), "m").rate == USUAL


def test_where_every_rate_diverges_there_is_none() -> None:
    assert tune(SETUP, ARM, losses(lambda factor, seed: math.inf), "m").rate is None


def test_what_a_short_run_bears_can_be_too_much_for_a_whole_one() -> None:
    def obtain(trial: Trial) -> Record:
        factor, steps = trial.arm.fields["learning_rate"] / USUAL, trial.arm.fields.get("max_steps", 30)
        short = {0.1: 1.6, 1.0: 1.5, 10.0: 1.4}.get(round(factor, 1), 2.0)
        whole = {0.1: 1.5, 1.0: 0.9, 10.0: 1.6}.get(round(factor, 1), 2.0)
        loss = whole if steps == 30 else short
        return Record(arm=trial.arm, seed=trial.seed, numbers={"validation_loss": loss})

    assert tune(SETUP, ARM, obtain, "m").rate == USUAL


def test_the_cost_of_a_search_is_what_the_study_would_not_have_run() -> None:
    """Count three short runs of a second, and the whole run of the rate that was not taken."""

    def obtain(trial: Trial) -> Record:
        loss = bowl(1.0)(trial.arm.fields["learning_rate"] / USUAL, 0)
        seconds = 1.0 if "max_steps" in trial.arm.fields else 10.0
        return Record(arm=trial.arm, seed=trial.seed, numbers={"validation_loss": loss}, seconds=seconds)

    assert tune(SETUP, ARM, obtain, "m").seconds == 3 + 10
