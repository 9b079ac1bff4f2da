"""The vocabulary of studies: what is compared, on which setup, what came out, what it means.

Standard library only. A study is data: a question names its arms, one trial is an arm with a seed,
its measure makes a record of it, and the records of all trials become an answer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

from loralab.errors import ConfigError, nearest
from loralab.studies.message import Chart, Message, Table
from loralab.values import build_config, check_choice

FORMAT = 1  # of records; a change makes old ones unreadable, and their trials run again
FALLING = ("loss", "perplexity", "rmse")  # metrics of which less is better
MOST_SEEDS = 1_000
EDGE = "edge"  # texts["rate"] of a record whose best rate lies at the edge of what was tried
NOT_MEASURED = Message("answer.not_measured")
STATUSES = DONE, DIVERGED, FAILED, MISSING = "done", "diverged", "failed", "missing"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared.

    `fields` are those of `train`, flat, as its config.toml has them ("method", "rank", ...);
    `options` are for the question's own measure. `tuned` is whether the learning rate shall be
    searched for; an arm that names one keeps it. `plain` arms need no seeds: one trial says all.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = True
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class StudySetup:
    """The setup that all arms of a study share, so that nothing but the arms can make a difference.

    `fields` are those of Training; `rows` how many rows of train, validation and test are used.
    `rates` are the learning rates that are searched for each arm, as multiples of the method's
    usual one. `metric` is what decides, where it is not the task's own. `quick` is one seed and fewer
    steps: an indication, not a result. Arms that can still be the best get more seeds, up to
    `seeds_max`. `margin` is the largest difference that does not matter: points of a score, percent
    of a loss; None is 1. Runs have the seeds `first_seed` and those that follow. `general` is the
    text, or the other task, that forgetting is measured on; empty is packaged data.
    """

    study: str
    model: str
    data: str
    mapping: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    seeds: int = 3
    quick: bool = False
    fixed_lr: bool = False
    rates: tuple[float, ...] = ()
    metric: str = ""
    values: tuple[str, ...] = ()
    seeds_max: int = 0
    margin: float | None = None
    general: str = ""
    first_seed: int = 0

    def __post_init__(self) -> None:
        """Keep lists of a file as tuples, and refuse numbers of seeds that no study has."""
        for name in ("values", "rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (0 < self.seeds <= MOST_SEEDS and 0 <= self.seeds_max <= MOST_SEEDS):
            message = f"a study has 1 to {MOST_SEEDS} seeds, got seeds {self.seeds} and seeds_max {self.seeds_max}"
            raise ConfigError(message, code="wrong_value", field="seeds")

    @property
    def max_length(self) -> int:
        """Return the longest row in tokens."""
        return int(self.fields.get("max_length", 512))

    def chosen(self, known: Sequence[str], usual: Sequence[str]) -> list[str]:
        """Return what was asked for after --values, each once; where nothing was, the usual.

        Raises:
            ConfigError: a value is none of the known ones.
        """
        for value in self.values:
            check_choice("values", value, known)
        return list(dict.fromkeys(self.values or usual))

    def ranks(self, usual: Sequence[int], *, other: Sequence[str] = ()) -> list[int]:
        """Return the ranks that were asked for after --values, each once and rising; else the usual.

        Args:
            other: values that may stand beside ranks; they are left out.

        Raises:
            ConfigError: a value is neither.
        """
        asked = [value for value in self.values if value not in other]
        for value in asked:
            if not (value.isascii() and value.isdigit() and int(value) > 0):
                known = ", ".join(("ranks, such as 2,4,8", *other))
                message = f"--values of the study {self.study} are {known}; got {value!r}{nearest(value, other)}"
                raise ConfigError(message, code="wrong_value", field="values")
        return sorted({int(value) for value in asked} or usual)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One arm with one seed, to be measured by `measure`: "module:function"."""

    measure: str
    setup: StudySetup
    arm: Arm
    seed: int

    @property
    def digest(self) -> str:
        """Return a digest of what decides the result, and of nothing else: trials of two studies can be the same."""
        setup = self.setup
        own = [self.measure, setup.model, setup.data, dict(setup.mapping), dict(setup.fields), dict(setup.rows)]
        deciding = [FORMAT, *own, setup.quick, setup.metric, dict(self.arm.fields), dict(self.arm.options), self.seed]
        if setup.general:  # so that trials of before there was any keep their names
            deciding.append(setup.general)
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()[:16]

    def record(self, **held: Any) -> "Record":
        """Return what came out of it: a record with these fields."""
        return Record(arm=self.arm, seed=self.seed, **held)

    def to_json(self) -> dict[str, Any]:
        """Return all fields, as files hold them."""
        return {"measure": self.measure, "ground": asdict(self.setup), "arm": asdict(self.arm), "seed": self.seed}

    @staticmethod
    def of(stored: Mapping[str, Any]) -> "Trial":
        """Read what `to_json` made."""
        setup, arm = build_config(StudySetup, stored["ground"]), build_config(Arm, stored["arm"])
        return Trial(measure=stored["measure"], setup=setup, arm=arm, seed=stored["seed"])


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one trial.

    `numbers` are scalars, `series` curves (read back, None where they were not finite), `items` one
    value per test row (larger is better), `tables` rows of anything, `texts` words such as the name of
    the metric. `seconds` is what the trial cost; `rate` the learning rate it ran with, `searched` what
    the search for it cost.
    """

    arm: Arm
    seed: int
    status: str = DONE
    reason: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    rate: float | None = None
    searched: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim, or that there is none.

    Attributes:
        holds: whether something is claimed.
        verdict: of a contrast: better, worse, equivalent or undecided; empty for other statements.
    """

    sentence: Message
    holds: bool
    verdict: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a question from its records.

    Attributes:
        sentence: the answer in one sentence.
        findings: every claim with its interval, those that do not hold included.
        blanks: the source's own blanks, by their label, filled in.
        method: how it was measured, beyond what holds for every study.
        caution: what would change the answer.
        advice: fields of `train` that follow from it.
        next: the experiment that it suggests. Where method, caution or next is None, the
            catalogue's "<question>.method" and so on are said.
        ranking: the arms side by side (contrast.Ranking), where arms were compared.
    """

    sentence: Message
    findings: Sequence[Finding] = ()
    blanks: Sequence[tuple[Message | str, Message]] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Chart] = ()
    method: Message | None = None
    caution: Message | None = None
    advice: Mapping[str, Any] = field(default_factory=dict)
    next: Message | None = None
    ranking: Any = None

    def __post_init__(self) -> None:
        """Leave out charts in which nothing would be drawn, and tables without rows."""
        for name in ("figures", "tables"):
            object.__setattr__(self, name, [part for part in getattr(self, name) if part.rows])


def nothing_measured(setup: StudySetup, labels: Sequence[Message | str] = (), **known: Any) -> Answer:
    """Return the answer of a study that has no record yet, where every blank says so; with what is known all the same."""
    nothing = Message("answer.nothing", study=setup.study)
    return Answer(**{"sentence": nothing, "blanks": [(label, nothing) for label in labels], **known})


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Settings of a study; what is left at none is the question's own."""

    model: Annotated[str | None, "short name, folder, GGUF file or hub id; none: by question"] = None
    data: Annotated[str | None, "task name, file, folder or hub id; none: by question"] = None
    seeds: Annotated[int | None, "runs of every arm that differ in nothing else; none is 3"] = None
    seeds_max: Annotated[int | None, "most seeds, for arms that can still be the best; none is 10"] = None
    margin: Annotated[float | None, "difference that does not matter: points of a score, % of a loss; none is 1"] = None
    quick: Annotated[bool, "one seed, fewer steps: an indication only"] = False
    fixed_lr: Annotated[bool, "one learning rate for all arms, instead of tuning each"] = False
    values: Annotated[tuple[str, ...], "arms to compare, such as ranks 2,4,8; none: by question"] = ()
    steps: Annotated[int | None, "optimiser steps of every run; none: by question"] = None
    batch_size: Annotated[int | None, "rows in one step; none: by question"] = None
    learning_rate: Annotated[float | None, "of all arms, with fixed_lr"] = None
    max_length: Annotated[int | None, "longest row in tokens; none: by question"] = None
    metric: Annotated[str | None, "what decides, such as loss or macro_f1; none: the task's own"] = None
    precision: Annotated[str, "dtype of the base: auto, fp32, bf16, fp16"] = "auto"
    test_rows: Annotated[int | None, "test rows that every arm is scored on; none: by question"] = None
    general: Annotated[str | None, "text (or labelled rows) to measure forgetting on; none: packaged"] = None

    def __post_init__(self) -> None:
        """Check every value."""
        wrong = partial(ConfigError, code="wrong_value")
        for name in ("seeds", "seeds_max", "steps", "batch_size", "test_rows", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise wrong(f"{name} must be a whole number of at least 1, got {value!r}", field=name)
        if self.margin is not None and not 0 < self.margin < float("inf"):
            raise wrong(f"margin must be positive, got {self.margin!r}", field="margin")
        seeds, most = self.seeds or 1, self.seeds_max
        if most is not None and most < seeds:
            raise wrong(f"seeds_max ({most}) must be at least seeds ({seeds})", field="seeds_max")
        object.__setattr__(self, "values", tuple(map(str, self.values)))
        if self.quick and max(seeds, most or 1) > 1:
            raise ConfigError("quick is one seed; leave out --quick, or --seeds and --seeds-max", field="quick")
        if self.learning_rate is not None and not self.fixed_lr:
            raise ConfigError("learning_rate has an effect only with --fixed-lr; arms are tuned")
