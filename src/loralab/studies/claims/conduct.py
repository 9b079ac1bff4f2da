"""study("claims"): registered claims -> their runs, in one folder that all share -> the board."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.errors import ConfigError, LoralabError
from loralab.studies import conduct, store
from loralab.studies.claims import board
from loralab.studies.claims.form import AGAIN, FOLDER, NAME, Claim, chosen, read, repetitions
from loralab.studies.claims.observations import Observation, observed
from loralab.studies.claims.plan import arms_of, setup_of
from loralab.studies.cluster import open_cluster
from loralab.studies.runner import Listener, Session, session
from loralab.studies.search import walk
from loralab.studies.study import MISSING, Record, StudyOptions, Trial
from loralab.values import parse_seconds, read_bytes

REGISTER = "registered"  # of a study folder: the files of the claims that have begun there


def decide_claims(
    folder: Path,
    asked: StudyOptions,
    others: Mapping[str, Any] | None = None,
    *,
    budget: str | None = None,
    resume: bool = False,
    listener: Listener | None = None,
    ray: str | None = None,
) -> conduct.Outcome:
    """Run what is missing of the claims that are asked for, and write the board after each.

    Args:
        asked: its `values` are numbers of claims, or files of one's own; none is all that come along.
        others: further settings of studies, which have no effect here.

    Raises:
        InputError: a claim, a setting or the folder is wrong, or a file changed after its runs.
    """
    _require_nothing_else({**vars(asked), **(others or {})})
    files = chosen(asked.values)
    claims = [read(file) for file in files]
    _require_one_each(claims, files)
    seconds = parse_seconds(budget) if budget is not None else None
    conduct.require_place(folder, resume=resume)
    for claim in claims:
        require_same(folder, claim)
    with open_cluster(ray) as away, session(folder, seconds, listener, away) as own:
        skipped, rows = _unable(own, claims), write_board(folder)
        for claim, file in zip(claims, files, strict=True):
            if claim.study not in skipped and own.pace.seconds_left > 0:
                register(folder, claim, file)
                own.run(setup_of(claim), arms_of(claim))
                rows = write_board(folder)
        if (again := _to_repeat(folder, rows, claims)) and own.pace.seconds_left > 0:
            skipped |= _unable(own, again)
            for claim in again:
                if claim.study not in skipped:
                    own.run(setup_of(claim), arms_of(claim))
                    rows = write_board(folder)
    done = {row["claim"]: row["robustness"] for row in rows}
    due = [*claims, *_to_repeat(folder, rows, claims)]
    missing = [one for one in due if one.claim not in done or (one.again and one.again not in done[one.claim])]
    unfinished = [one.study for one in missing if one.study not in skipped]
    left = dict.fromkeys(unfinished, "runs are missing; go on with --resume")
    return conduct.Outcome(folder=folder, answers={}, skipped={**skipped, **left}, board=rows)


def _to_repeat(folder: Path, rows: Sequence[board.Row], claims: Sequence[Claim]) -> list[Claim]:
    """Return what checks those of the claims that were refuted."""
    refuted = {row["claim"] for row in rows if row["verdict"] == "refuted"}
    return [one for claim in claims if claim.claim in refuted for one in repetitions(claim, folder / REGISTER / AGAIN)]


def _unable(own: Session, claims: Sequence[Claim]) -> dict[str, str]:
    """Prepare all claims before the first run; return why some cannot run here.

    Raises:
        LoralabError: one cannot, and is the only one.
    """
    skipped: dict[str, str] = {}
    for claim in claims:
        setup = setup_of(claim)
        try:
            own.prepare(setup, arms_of(claim))
        except LoralabError as error:
            if len(claims) == 1 and not claim.again:
                raise
            skipped[claim.study] = str(error)
            own.skip(setup, str(error))
        else:
            own.tell_of(setup, "ready")
    return skipped


def _require_nothing_else(given: Mapping[str, Any]) -> None:
    """Refuse settings of other studies: what a claim's runs are is registered in its file.

    Raises:
        ConfigError: one was given.
    """
    usual = vars(StudyOptions())
    for name, value in given.items():
        if name != "values" and value and value != usual.get(name):
            message = f"{name} has no effect on claims, whose runs are registered in their files"
            hint = f"copy one, change it and give it: loralab study {NAME} mine.toml"
            raise ConfigError(f"{message}; {hint}", code="no_effect", field=name)


def _require_one_each(claims: Sequence[Claim], files: Sequence[Path]) -> None:
    """Refuse two files of one number before hours are spent on the first.

    Raises:
        ConfigError: names both.
    """
    seen: dict[int, Path] = {}
    for claim, file in zip(claims, files, strict=True):
        if (other := seen.setdefault(claim.claim, file)) != file:
            message = f"claim {claim.claim} is in {other} and in {file}; give one of them, or another number"
            raise ConfigError(message, code="given_twice", field=f"claim {claim.claim}")


def require_same(folder: Path, claim: Claim) -> None:
    """Require a claim that has begun here to be the one that was registered.

    Raises:
        ConfigError: its file changed after its run.
    """
    if (held := registered(folder).get(claim.claim)) is not None and held.digest != claim.digest:
        message = (
            f"claim {claim.claim} is registered in {folder} as {held.digest}, and its file is {claim.digest} by now"
        )
        hint = "restore it, or register it anew: a new --output-dir, or a .toml file with another number"
        raise ConfigError(f"{message}; {hint}", code="claim_changed", field=f"claim {claim.claim}")


def registered(folder: Path) -> dict[int, Claim]:
    """Return the claims that have begun in a folder, by number, as they were then."""
    found = [read(file) for file in (folder / REGISTER).glob("[0-9]*.toml")]
    return {claim.claim: claim for claim in sorted(found, key=lambda claim: claim.claim)}


def register(folder: Path, claim: Claim, file: Path) -> None:
    """Keep the file of a claim before its first run, and how it is run again where it is refuted.

    Raises:
        ConfigError: it changed since it was read.
    """
    place = folder / REGISTER
    for copy, source in ((place / f"{claim.claim}.toml", file), (place / AGAIN, FOLDER / AGAIN)):
        if not copy.is_file():
            atomic.write_file(copy, read_bytes(source, ConfigError))
    require_same(folder, claim)


def write_board(folder: Path) -> list[board.Row]:
    """Write the board of all claims of a folder whose runs are there; return its rows."""
    rows: list[board.Row] = []
    every: list[Observation] = []
    for claim in registered(folder).values():
        if found := observations_of(folder, claim):
            checks = repetitions(claim, folder / REGISTER / AGAIN) if (folder / REGISTER / AGAIN).is_file() else []
            found += [one for check in checks for one in observations_of(folder, check)]
            rows.append(board.row_of(claim, found))
            every += found
    board.write(folder, rows, every)
    return rows


def observations_of(folder: Path, claim: Claim) -> list[Observation]:
    """Return what the runs of a claim gave; nothing while one is missing."""

    def obtain(trial: Trial) -> Record:
        return store.read(folder, trial) or trial.record(status=MISSING)

    records = walk(setup_of(claim), arms_of(claim), obtain)
    return [] if any(record.status == MISSING for record in records) else observed(claim, records)
