"""predict."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.cli.app import app
from loralab.cli.arguments import DEFAULT_MODEL, Data, Json, Map, Model, mapping_of
from loralab.cli.tables import print_json, print_table
from loralab.cli.working import working
from loralab.errors import ConfigError
from loralab.studies.catalog import require_installed

if TYPE_CHECKING:
    from loralab.studies.prediction.law import Estimate
    from loralab.studies.prediction.predict import Prediction


@app.command()
def predict(
    model: Model = None,
    data: Data = None,
    map_: Map = None,
    max_steps: Annotated[int | None, typer.Option(help="steps of the run; none: one pass over the rows", min=1)] = None,
    json_: Json = False,
) -> None:
    """Predict the best learning rate and the smallest sufficient rank from a few gradients; trains nothing."""
    require_installed()
    if data is None:
        raise ConfigError("give --data: a task name, a file, a folder or a hub id", code="missing_option", field="data")
    from loralab.studies.prediction.predict import predict as from_gradients

    model = model or DEFAULT_MODEL
    with working(f"taking gradients of {model} on {data}", quiet=json_):
        found = from_gradients(model=model, data=data, mapping=mapping_of(map_), max_steps=max_steps)
    if json_:
        print_json(found.to_json())
    else:
        print_table(f"{model} on {data}, {found.steps:,} steps", _rows(found))


def _rows(found: "Prediction") -> list[tuple[str, str]]:
    checked = found.standing
    listed = [(f"learning rate, {m}", f"{rate.value:.1e}{_interval(rate, '.1e')}") for m, rate in found.rates.items()]
    models = ", ".join(checked["models"])
    rows = [
        *listed,
        ("rank, lora", f"{found.chosen_rank}{_interval(found.rank, '.0f')}"),
        ("from", f"{found.features.tokens:,} tokens, and {checked['sweeps']} sweeps on {models}"),
        ("cost", f"{found.share:.1%} of the passes of such a sweep"),
    ]
    if found.unlike:
        rows.append(("unlike the sweeps", f"{', '.join(found.unlike)}: a guess beyond what was measured"))
    return [*rows, *_checked(checked)]


def _checked(standing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say how the prediction did on data sets that it had not seen, and what follows."""
    rules = standing["rules"]
    if not rules:
        return [("not checked", "too few data sets to leave one out: take this as a guess")]
    lines = [
        (
            f"checked for {standing['method']}, {name}",
            f"rate within half a decade {own['rate_hits']:.0%}, rank within a factor of 2 {own['rank_hits']:.0%}, "
            f"loss above the best {own['regret']:.1f} %",
        )
        for name, own in rules.items()
    ]
    beats = "on average it costs less than the default on data sets that it had not seen"
    fails = "it is not shown to cost less than the default on data sets that it had not seen: keep the default"
    return [*lines, ("verdict", beats if standing["beats_default"] else fails)]


def _interval(found: "Estimate", form: str) -> str:
    return f"  ({found.low:{form}} ... {found.high:{form}}; 90 %, {found.data_sets} data sets)"
