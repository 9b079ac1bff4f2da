"""The studies that can be named: question, and the setup they stand on unless told otherwise.

Standard library only.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loralab.errors import ConfigError, nearest
from loralab.studies.study import StudyOptions, StudySetup
from loralab.training.settings import Training

NEEDED = ("scipy", "altair", "vl_convert", "jinja2")
SEEDS_MAX = 10
RECOMMEND = "recommend"  # a search, not one of the questions
ENCODER, WRITER, VISION = "minilm-l6", "smollm2-135m", "dinov2-s"
# times the method's usual rate: short runs want higher ones
QUICK_RATES = (2.0, 6.0)
RATES = (10**-0.5, 1.0, 10**0.5, 10.0)
REVIEWS, CLOTHES, DIGITS = "movie-reviews", "fashion-mnist", "digits"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A study by its question; the catalogues hold its title, the source's own heading.

    Of several tasks in `data` the first that is here is taken, and the first where none is.
    `steps`, `batch_size` and `rows` of test are (thorough, quick). `fields` are those of Training
    that all arms share. Where it `races`, arms that can still be the best get more seeds.
    """

    number: str
    model: str = ENCODER
    data: tuple[str, ...] = (REVIEWS,)
    steps: tuple[int, int] = (150, 60)
    batch_size: int = 16
    rows: tuple[int, int] = (500, 300)
    seeds: int = 3
    races: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


ONE_WRITER = Question(
    races=False,
    number="",
    model=WRITER,
    steps=(40, 15),
    batch_size=8,
    rows=(100, 24),
    seeds=1,
    fields={"learning_rate": 1e-3},  # twice the usual one: the runs are short
)
STUDIES: dict[str, Question] = {
    "lowrank": Question(races=False, number="Q1", steps=(150, 48)),
    "rank": Question(number="Q2"),
    "init": Question(number="Q3", steps=(150, 52), rows=(500, 200)),
    "targets": Question(number="Q4"),
    "scaling": Question(races=False, number="Q5", steps=(60, 26), rows=(300, 100), seeds=2),  # of 45 combinations
    "merge": replace(ONE_WRITER, number="Q6"),
    "memory": Question(races=False, number="Q7", model=WRITER, steps=(10, 3), batch_size=12, rows=(4, 2)),
    "inference": replace(ONE_WRITER, number="Q8"),
    "multitask": Question(races=False, number="Q9", steps=(80, 30), rows=(200, 100), seeds=1),
    "methods": Question(number="Q10"),
    "adaptive": Question(number="Q11"),
    "vision": Question(
        number="Q12", model=VISION, data=(CLOTHES, DIGITS), steps=(100, 24), rows=(400, 150), fields={"image_size": 70}
    ),
}


def require_installed() -> None:
    """Refuse to begin where the libraries of the extra `study` are missing.

    Raises:
        ConfigError: one is.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"studies need {', '.join(missing)}: pip install 'loralab[study]'")


def question(name: str) -> Question:
    """Return the question behind a study's name.

    Raises:
        ConfigError: there is no such study.
    """
    if name not in STUDIES:
        known = f"Studies: {', '.join(STUDIES)}, all, claims; or a .toml file of your own"
        raise ConfigError(f"there is no study {name!r}{nearest(name, [*STUDIES, 'all', 'claims'])} {known}")
    return STUDIES[name]


def usual_data(own: Question) -> str:
    """Return the task that a question stands on where nothing else is asked for."""
    if len(own.data) == 1:
        return own.data[0]
    from loralab.tasks.catalog import TASKS

    return next((name for name in own.data if TASKS[name].locate() is not None), own.data[0])


def search_setup(asked: StudyOptions, mapping: Mapping[str, str] | None = None) -> StudySetup:
    """Return the setup that all candidates of a search share: that of the user's own run.

    Steps are 0 where they are not asked for: as many as the run takes.
    """
    found, seeds = setup("rank", asked, mapping), asked.seeds or 1
    steps, batch = asked.steps or 0, asked.batch_size or Training().batch_size
    return replace(
        found,
        study=RECOMMEND,
        fields={**found.fields, "max_steps": steps, "batch_size": batch},
        rows={name: count for name, count in found.rows.items() if name != "train"},
        seeds=seeds,
        seeds_max=max(seeds, asked.seeds_max or SEEDS_MAX),
        rates=(),
        values=(),
    )


def setup(name: str, asked: StudyOptions, mapping: Mapping[str, str] | None = None) -> StudySetup:
    """Return the setup that all arms of a study share, with whatever was left open filled in.

    Raises:
        ConfigError: there is no such study.
    """
    own = question(name)
    at = 1 if asked.quick else 0
    seeds = 1 if asked.quick else asked.seeds or own.seeds
    steps, rows = asked.steps or own.steps[at], asked.test_rows or own.rows[at]
    batch = asked.batch_size or own.batch_size
    fields = {"max_steps": steps, "batch_size": batch, "precision": asked.precision, **own.fields}
    fields |= {k: v for k in ("max_length", "learning_rate") if (v := getattr(asked, k)) is not None}
    return StudySetup(
        study=name,
        model=asked.model or own.model,
        data=asked.data or usual_data(own),
        mapping=dict(mapping or {}),
        fields=fields,
        rows={"train": steps * batch, "validation": rows, "test": rows},
        seeds=seeds,
        seeds_max=seeds if asked.quick or not own.races else max(seeds, asked.seeds_max or SEEDS_MAX),
        margin=asked.margin,
        quick=asked.quick,
        fixed_lr=asked.fixed_lr,
        values=asked.values,
        metric=asked.metric or "",
        general=asked.general or "",
        rates=QUICK_RATES if asked.quick else RATES,
    )
