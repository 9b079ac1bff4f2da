"""The commands that a report gives: run the study again, train as it advises."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.studies.catalog import RECOMMEND, STUDIES
from loralab.studies.study import Ground, Record
from loralab.values import join_pairs

REPEATED = {  # flags of a study, and the fields of its ground that they set
    "--steps": "max_steps",
    "--batch-size": "batch_size",
    "--precision": "precision",
    "--max-length": "max_length",
}


def repeat_command(ground: Ground) -> str:
    """Return the command that runs the study again."""
    if ground.study not in STUDIES and ground.study != RECOMMEND:
        return shlex.join(["loralab", "study", f"{ground.study}.toml"])
    search = ground.study == RECOMMEND
    parts = ["loralab", *(["recommend"] if search else ["study", ground.study])]
    parts += ["--model", ground.model, "--data", ground.data, *_map(ground)]
    parts += ["--quick"] if ground.quick else ["--seeds", str(ground.seeds)]
    for flag, field in REPEATED.items():
        parts += [flag, str(ground.fields[field])] if field in ground.fields else []
    parts += ["--test-rows", str(ground.rows["test"])]
    parts += ["--values", ",".join(ground.values)] if ground.values and not search else []
    if ground.seeds_max > ground.seeds:
        parts += ["--seeds-max", str(ground.seeds_max)]
    parts += ["--margin", f"{ground.margin:g}"] if ground.margin is not None else []
    parts += ["--metric", ground.metric] if ground.metric else []
    parts += ["--fixed-lr"] if ground.fixed_lr else []
    if ground.fixed_lr and "learning_rate" in ground.fields:  # else it is the question's own
        parts += ["--learning-rate", str(ground.fields["learning_rate"])]
    return shlex.join(parts)


def search_command(ground: Ground) -> str:
    """Return the command that searches for a configuration of the same model and data."""
    return shlex.join(["loralab", "recommend", "--model", ground.model, "--data", ground.data, *_map(ground)])


def _map(ground: Ground) -> list[str]:
    return ["--map", join_pairs(ground.mapping)] if ground.mapping else []


def apply_command(ground: Ground, advice: Mapping[str, Any], own: Sequence[Record]) -> str:
    """Return the command that trains as the answer says; empty where it gives no advice."""
    if not advice:
        return ""
    parts = ["loralab", "train", "--model", ground.model, "--data", ground.data, *_map(ground)]
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
    rated = [r for r in own if r.rate and r.arm.fields.get("method") == advice.get("method", "lora")]
    return nearest_to(advice, rated).rate if rated else None


def nearest_to(advice: Mapping[str, Any], own: Sequence[Record]) -> Record:
    """Return the record whose arm has most of the advised fields, and the fewest others."""

    def alike(record: Record) -> tuple[int, int]:
        fields = record.arm.fields
        return sum(fields.get(k) == v for k, v in advice.items()), -len(fields)

    return max(own, key=alike)


def flat(value: Any) -> str:
    """Write a value as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
