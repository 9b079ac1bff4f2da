"""The commands that a report gives: run the study again, go on with it, decide it, train as it advises."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.studies.catalog import RECOMMEND, SEEDS_MAX, STUDIES
from loralab.studies.contrast import Ranking
from loralab.studies.study import MISSING, Record, StudySetup
from loralab.values import join_pairs

ROWS = range(1, 100_000)  # more test rows than these nobody has
LEAST_SEEDS = 3  # with which a study that shall decide begins
REPEATED = {  # flags of a study, and the fields of its setup that they set
    "--steps": "max_steps",
    "--batch-size": "batch_size",
    "--precision": "precision",
    "--max-length": "max_length",
}


def repeat_command(setup: StudySetup) -> str:
    """Return the command that runs the study again."""
    if setup.study not in STUDIES and setup.study != RECOMMEND:
        return shlex.join(["loralab", "study", f"{setup.study}.toml"])
    search = setup.study == RECOMMEND
    parts = ["loralab", *(["recommend"] if search else ["study", setup.study])]
    parts += ["--model", setup.model, "--data", setup.data, *_map(setup)]
    parts += _seeds(setup)
    given = {flag: setup.fields.get(field) for flag, field in REPEATED.items()} | {"--test-rows": setup.rows["test"]}
    given |= {"--values": "" if search else ",".join(setup.values)}
    given |= {"--margin": None if setup.margin is None else f"{setup.margin:g}", "--metric": setup.metric}
    for flag, value in given.items():
        parts += [] if value in (None, "") else [flag, str(value)]
    parts += ["--fixed-lr"] if setup.fixed_lr else []
    if setup.fixed_lr and "learning_rate" in setup.fields:  # else it is the question's own
        parts += ["--learning-rate", str(setup.fields["learning_rate"])]
    return shlex.join(parts)


def deciding_command(setup: StudySetup, found: Ranking | None, records: Sequence[Record], folder: str) -> str:
    """Return the command whose seeds, test rows or time would decide a ranking; empty where none is known to.

    Args:
        folder: of the study: a search goes on there, a longer study stands beside it.
    """
    if found is None or found.recommended is None or found.decided or len(found.names) < 2:
        return ""
    if setup.study == RECOMMEND:
        minutes = math.ceil(2 * sum(r.seconds + r.searched for r in records) / 60)
        return f"{search_command(setup)} {shlex.join(['--output-dir', folder, '--resume', '--budget', f'{minutes}m'])}"
    closest, seeds = found.closest_rival, max(setup.seeds, LEAST_SEEDS)
    if closest.asks_seeds:
        longer = replace(setup, quick=False, seeds=seeds, seeds_max=max(seeds, closest.seeds_needed or 0))
    elif max(setup.seeds, setup.seeds_max) < SEEDS_MAX:  # as many as a study may have before more is asked for
        longer = replace(setup, quick=False, seeds=seeds, seeds_max=SEEDS_MAX)
    else:
        rows = needed if (needed := closest.rows_needed or 0) in ROWS else 4 * closest.rows
        longer = replace(setup, rows={**setup.rows, "test": rows})
    own = [] if setup.study in STUDIES else ["--test-rows", str(longer.rows.get("test", closest.rows)), *_seeds(longer)]
    return f"{repeat_command(longer)} {shlex.join([*own, '--output-dir', f'{folder}-longer'])}"


def resuming_command(setup: StudySetup, records: Sequence[Record], folder: str) -> str:
    """Return the command that runs what is missing; empty where nothing is."""
    if not any(record.status == MISSING for record in records) or setup.study == RECOMMEND:
        return ""
    return f"{repeat_command(setup)} {shlex.join(['--output-dir', folder, '--resume'])}"


def _seeds(setup: StudySetup) -> list[str]:
    most = ["--seeds-max", str(setup.seeds_max)] if setup.seeds_max else []
    return ["--quick"] if setup.quick else ["--seeds", str(setup.seeds), *most]


def search_command(setup: StudySetup) -> str:
    """Return the command that searches for a configuration of the same model and data."""
    return shlex.join(["loralab", "recommend", "--model", setup.model, "--data", setup.data, *_map(setup)])


def _map(setup: StudySetup) -> list[str]:
    return ["--map", join_pairs(setup.mapping)] if setup.mapping else []


def apply_command(setup: StudySetup, advice: Mapping[str, Any], own: Sequence[Record]) -> str:
    """Return the command that trains as the answer says; empty where it gives no advice."""
    if not advice:
        return ""
    parts = ["loralab", "train", "--model", setup.model, "--data", setup.data, *_map(setup)]
    fields = dict(advice)
    if "learning_rate" not in fields and (rate := rate_for(advice, own)):
        fields["learning_rate"] = rate
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag if value else f"--no-{flag[2:]}")
        else:
            parts += [flag, flat(value)]
    return shlex.join([*parts, "--output-dir", "runs/chosen"])


def rate_for(advice: Mapping[str, Any], own: Sequence[Record]) -> float | None:
    """Return the learning rate of the measured arm that is nearest to the advised fields."""

    def alike(record: Record) -> tuple[int, int]:  # most of the advised fields, and the fewest others
        fields = record.arm.fields
        return sum(fields.get(k) == v for k, v in advice.items()), -len(fields)

    rated = [r for r in own if r.rate and r.arm.fields.get("method", "lora") == advice.get("method", "lora")]
    return max(rated, key=alike).rate if rated else None


def flat(value: Any) -> str:
    """Write a value as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
