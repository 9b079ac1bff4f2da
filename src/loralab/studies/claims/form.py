"""A claim as it is registered before its runs: what is measured, and what would hold, refute or leave it undecided.

Standard library only. Each file of this folder holds one (docs/claims/README.md lists them). An estimate
with its 95 % interval [low, high] decides, "refuted" being asked first:

    direction   holds where                                     refuted where
    above       low > threshold                                 high < threshold + margin
    below       high < threshold                                low > threshold - margin
    within      threshold - margin <= low, high <= its sum      the interval lies outside of that
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, nearest
from loralab.values import build_config, check_choice, check_count, read_bytes, read_toml

NAME = "claims"  # of the study that decides them
FOLDER = Path(__file__).parent
DIRECTIONS = ABOVE, BELOW, WITHIN = "above", "below", "within"
READINGS = ROWS, NUMBER, BEST_RATE, EQUAL_LOSS, INTERACTION, CORRELATION, VARIANCE = (
    *("rows", "number", "best_rate", "equal_loss"),
    *("interaction", "rank_correlation", "variance"),
)
USED: Mapping[str, tuple[str, ...]] = {  # what each reading uses beside its name and `of`
    ROWS: ("to", "number", "beside", "over", "scale"),
    NUMBER: ("to", "number", "table", "where", "beside", "over", "scale"),
    BEST_RATE: ("to", "over"),
    EQUAL_LOSS: ("to", "where", "over", "scale"),
    INTERACTION: ("to", "number", "scale"),
    CORRELATION: ("to", "number", "table", "where", "beside"),
    VARIANCE: ("where",),
}
SCALES = PLAIN, POINTS, PERCENT, LOG10 = "plain", "points", "percent", "log10"
CHECKS = BY_SEED, BY_MARGIN, OTHER_SEEDS, OTHER_DATA = "seeds", "margin", "other seeds", "other data"
AGAIN = "again.toml"  # which other seeds and which other data a claim that was refuted is run on
DERIVED = ("digest", "again")  # fields of a claim that do not stand in its file
MEASURES = {
    "trained": "loralab.studies.claims.trained:measure",
    "base": "loralab.studies.trained:untrained",
    "overlaps": "loralab.studies.measures.overlaps:measure",
    "full": "loralab.studies.measures.spectra:measure",
    "tradeoff": "loralab.studies.measures.tradeoff:measure",
    "cuts": "loralab.studies.measures.cuts:measure_global",
    "capacity": "loralab.studies.measures.capacity:measure",
    "sharpness": "loralab.studies.measures.sharpness:measure",
    "modules": "loralab.studies.measures.module_scores:measure",
    "merging": "loralab.studies.measures.merging:measure",
    "merged": "loralab.studies.measures.merging:measure",
    "dimension": "loralab.studies.measures.dimension:measure",
    "universal": "loralab.studies.measures.universal:measure",
    "sequence": "loralab.studies.measures.sequence:measure",
    "latency": "loralab.studies.claims.timed:passes",
    "throughput": "loralab.studies.claims.timed:batches",
    "budget": "loralab.studies.measures.shrinking:measure",
    "start": "loralab.studies.claims.exact:start",
    "count": "loralab.studies.claims.exact:count",
    "nf4": "loralab.studies.claims.exact:nf4",
    "gradients": "loralab.studies.claims.exact:gradients",
}
MOST_MINUTES = 90.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An arm: `fields` of train, `options` of its measure.

    `rates` make a sweep: whole runs at each learning rate. Without them, and without a learning_rate
    among the fields, the rate is searched for as in every study.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    measure: str = "trained"
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_choice("measure", self.measure, tuple(MEASURES))
        object.__setattr__(self, "rates", tuple(self.rates))
        if any(not 0 < rate < 1e3 for rate in self.rates):
            raise ConfigError("rates must be positive", code="wrong_value", field="rates")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records become one estimate.

    Attributes:
        name: "rows" compares arms by test row (larger is better: losses count negated); "number" reads
            a number of each run; "best_rate" the log10 of the best learning rate of a sweep, from a
            parabola through its lowest validation losses; "equal_loss" what is left elsewhere of the
            first arm less the second, where both have learnt as much. "interaction" is by how much the
            first of `of` is better than the first of `to`, less the same of the second ones, by test row.
            "rank_correlation" is Spearman's of a number of the arms `of` with the column `beside` of the
            table of the arm `to`, whose rows are the types that `where` names for each arm; its interval is
            over seeds alone, so that a chance order of few types is not in it. "variance" is the share of
            the validation loss's variance that the field where.ours accounts for, less the largest of those
            where.theirs; a lost run has the worst loss of its seed.
        of, to: arms; every pair of one of `of` with one of `to`, and the weakest of them counts: a
            claim of several pairs holds only where each does. Without `to`, each of `of` alone.
        number: of a record: an item by row, or a number; a column where there is a `table`.
        where: the rows of the table that count, of which the median is taken. With "equal_loss", the
            names of the two runs among the options of the arm, under "ours" and "theirs".
        beside: a number or column that is taken off, such as a chance level; with log10 it divides. Of
            rows without `to`: the item of the same run that is taken off.
        over: a field of the arms; the slope of the value on the log10 of it is what counts.
        scale: plain, points (of a hundred), percent (of the mean of `to`), log10.
    """

    name: str
    of: tuple[str, ...]
    to: tuple[str, ...] = ()
    number: str = "loss"
    table: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    beside: str = ""
    over: str = ""
    scale: str = PLAIN

    def __post_init__(self) -> None:
        """Check every choice."""
        check_choice("reading.name", self.name, READINGS)
        check_choice("reading.scale", self.scale, SCALES)
        for name in ("of", "to"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.of:
            raise ConfigError("a reading names at least one arm", code="missing", field="of")
        for name in self._without_effect():
            raise ConfigError(f"{self.name} does not use {name}", code="no_effect", field=name)
        if self.over and (self.to or len(self.of) < 2):
            raise ConfigError("a slope is of two arms or more, and beside none", code="wrong_value", field="over")
        if self.name in (EQUAL_LOSS, VARIANCE) and self.where.keys() != {"ours", "theirs"}:
            raise ConfigError(f"{self.name} reads where.ours and where.theirs", code="missing", field="where")
        if self.name == ROWS and bool(self.to) == bool(self.beside):
            message = "rows are compared with those of another arm, `to`, or with other ones of the same run, `beside`"
            raise ConfigError(message, code="missing" if not self.to else "no_effect", field="to")
        if self.scale == PERCENT and not (self.name == ROWS and self.to):
            raise ConfigError("percent is of rows beside those of another arm", code="no_effect", field="scale")
        if self.name == INTERACTION and not len(self.of) == len(self.to) == 2:
            raise ConfigError("an interaction is of two arms and two others", code="wrong_value", field="to")
        if self.name == CORRELATION and (len(self.to) != 1 or self.where.keys() != set(self.of) or not self.beside):
            message = "rank_correlation reads `beside` of one arm `to`, and where names a type for each of `of`"
            raise ConfigError(message, code="wrong_value", field="where")

    def _without_effect(self) -> list[str]:
        """Return the settings that were given, and that this reading does not use."""
        used = {"name", "of", *USED[self.name]} - ({"where"} if self.name == NUMBER and not self.table else set())
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (one.default, {})]
        return [name for name in given if name not in used]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim, and the runs that decide it here.

    Attributes:
        claim: its number in the list of claims.
        there: the published number, as text; `unit` is what the estimate counts.
        margin: the smallest effect that matters; see the rule at the top of this file.
        exact: nothing is drawn at random; one run says all.
        first_seed: runs have the seeds first_seed, first_seed + 1, ...
        rates: multiples of the usual rate that a search begins with; none is that of every study.
        minutes: what all its runs take at most, on two cores that do nothing else.
        robustness: the checks that stand beside the verdict: "seeds" leaves each seed out, "margin"
            takes twice or half the margin, whichever makes the same verdict harder to reach; "other seeds"
            and "other data" run a claim that was refuted again (again.toml).
        digest: of the file; what ran under another one is not gone on with.
        again: the check that these runs are of, "other seeds" or "other data"; empty is the claim itself.
    """

    claim: int
    title: str
    source: str
    there: str
    unit: str
    model: str
    data: str
    arms: Mapping[str, Entry]
    reading: Reading
    direction: str
    margin: float
    minutes: float
    threshold: float = 0.0
    seeds: int = 3
    first_seed: int = 0
    exact: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    robustness: tuple[str, ...] = CHECKS
    note: str = ""
    digest: str = ""
    again: str = ""

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("direction", self.direction, DIRECTIONS)
        check_count("claim", self.claim)
        check_count("seeds", self.seeds)
        check_count("first_seed", self.first_seed, least=0)
        for name in ("rates", "robustness"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for check in self.robustness:
            check_choice("robustness", check, CHECKS)
        for name, most in (("margin", float("inf")), ("minutes", MOST_MINUTES)):
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(f"{name} must be positive, and at most {most:g}", code="wrong_value", field=name)
        for arm in (*self.reading.of, *self.reading.to):
            if arm not in self.arms:
                raise ConfigError(f"there is no arm {arm!r}{nearest(arm, self.arms)}", code="no_arm", field="reading")

    @property
    def study(self) -> str:
        """Return the name under which a folder keeps its setup and arms."""
        return f"claim-{self.claim}" + (f", {self.again}" if self.again else "")


def read(file: Path) -> Claim:
    """Return the claim in a file.

    Raises:
        ConfigError: it cannot be read, lacks a key, or has one that nothing knows.
    """
    content = read_toml(file)
    for name in DERIVED:
        if name in content:
            message = f"{file}: {name} follows from the file, and does not stand in it"
            raise ConfigError(message, code="no_effect", field=name)
    arms = content.get("arms")
    if not isinstance(arms, Mapping) or not arms:
        raise ConfigError(f"{file} needs a table arms, with one table for each arm", code="missing", field="arms")
    built: dict[str, Any] = {name: _built(Entry, own, f"{file}: arms.{name}") for name, own in arms.items()}
    reading = _built(Reading, content.get("reading"), f"{file}: reading")
    found: Claim = _built(Claim, {**content, "arms": built, "reading": reading, "digest": _digest(file)}, str(file))
    return found


def repetitions(claim: Claim, file: Path = FOLDER / AGAIN) -> list[Claim]:
    """Return the claim as it is run again once it is refuted: with other seeds, and on other data if there are some.

    Args:
        file: which those are: {"seeds_apart": count, "data": {name: another}}.

    Raises:
        ConfigError: it cannot be read.
    """
    content = read_toml(file)
    found: list[Claim] = []
    if OTHER_SEEDS in claim.robustness and not claim.exact:
        found.append(replace(claim, again=OTHER_SEEDS, first_seed=claim.first_seed + int(content["seeds_apart"])))
    if OTHER_DATA in claim.robustness and not claim.exact and claim.data in content["data"]:
        found.append(replace(claim, again=OTHER_DATA, data=content["data"][claim.data]))
    return found


def _digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file, ConfigError)).hexdigest()[:16]


def _built(kind: Any, values: Any, where: str) -> Any:
    """Return a dataclass from a table that has all of its keys and no others."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a table", code="invalid_type", field=where.rpartition(" ")[2])
    known = {one.name: one for one in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, known)}", code="unknown_key", field=key)
    for name, one in known.items():
        if name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where} lacks {name}", code="missing", field=name)
    try:
        return build_config(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", code=error.code, field=error.field) from None


def packaged() -> dict[int, Path]:
    """Return the files of the claims that come along, by number."""
    return dict(sorted((int(file.stem), file) for file in FOLDER.glob("[0-9]*.toml")))


def chosen(asked: Iterable[str]) -> list[Path]:
    """Return the files of the claims that were asked for by number, or of one's own; none is all that come along.

    Raises:
        ConfigError: there is none of this number.
    """
    known = packaged()
    numbers = {str(number): file for number, file in known.items()}
    found: list[Path] = []
    for name in asked or numbers:
        if name.endswith(".toml"):
            found.append(Path(name))
        elif name in numbers:
            found.append(numbers[name])
        else:
            near = _nearest_number(name, list(known)) or nearest(name, numbers) or "."
            message = f"there is no claim {name!r}{near} Claims: {', '.join(numbers)}; or a .toml file of your own"
            raise ConfigError(message, code="no_claim", field="claims")
    return list(dict.fromkeys(found))


def _nearest_number(name: str, known: list[int]) -> str:
    """Propose the nearest number, in the words of `nearest`."""
    if not (name.isascii() and name.isdigit()):
        return ""
    return f"; did you mean {min(known, key=lambda own: abs(own - int(name)))}?"
