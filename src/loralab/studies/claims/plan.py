"""A claim -> the setup and the arms of a study, whose runs are named by what decides them: claims share them."""

from dataclasses import replace

from loralab.errors import ConfigError
from loralab.studies.catalog import RATES
from loralab.studies.claims.form import MEASURES, Claim, Entry
from loralab.studies.fields import configured
from loralab.studies.study import Arm, StudySetup

AT = " @ "  # between the name of a sweep and a rate
TRAINS = ("trained", "full", "budget", "cuts", "capacity", "sharpness")  # the fields of the arm
PLAIN = ("base", "modules", "merging", "start", "count", "nf4", "gradients")  # measured once


def setup_of(claim: Claim) -> StudySetup:
    """Return the setup that the claim's arms share."""
    return StudySetup(
        study=claim.study,
        model=claim.model,
        data=claim.data,
        fields=dict(claim.fields),
        rows=dict(claim.rows),
        seeds=claim.seeds,
        first_seed=claim.first_seed,
        seeds_max=claim.seeds,
        rates=claim.rates or RATES,
        margin=claim.margin,
    )


def arms_of(claim: Claim) -> list[Arm]:
    """Return the claim's arms, a sweep as one arm for each rate.

    Raises:
        ConfigError: fields of train are unknown or wrong, or the rate of a sweep stands in them.
    """
    found = [arm for name, entry in claim.arms.items() for arm in _arms(name, entry)]
    for arm in found:
        if arm.fields:
            configured({**claim.fields, **arm.fields})
    if len({arm.name for arm in found}) < len(found):
        raise ConfigError(f"claim {claim.claim} has two arms of one name", code="given_twice", field="arms")
    return found


def _arms(name: str, entry: Entry) -> list[Arm]:
    options = {"measure": MEASURES[entry.measure], **entry.options}
    arm = Arm(
        name=name,
        fields=dict(entry.fields),
        options=options,
        tuned=entry.measure in TRAINS,
        plain=entry.measure in PLAIN,
    )
    if entry.measure == "trained" and not entry.fields:
        raise ConfigError(f"arm {name!r} trains, and has no fields", code="missing", field="fields")
    if not entry.rates:
        return [arm]
    if "learning_rate" in entry.fields:
        raise ConfigError(f"arm {name!r} has rates and a learning_rate", code="no_effect", field="learning_rate")
    return [
        replace(arm, name=f"{name}{AT}{rate:g}", fields={**arm.fields, "learning_rate": rate}) for rate in entry.rates
    ]


def sweep_of(arm: Arm) -> str:
    """Return the name under which a claim's file has an arm."""
    return arm.name.rpartition(AT)[0] or arm.name
