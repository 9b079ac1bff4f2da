"""train, plan, evaluate, generate, models, tasks."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.adapters.registry import specs
from loralab.cli.app import app
from loralab.cli.arguments import (
    DEFAULT_MODEL,
    METHODS,
    NAMES,
    ConfigFile,
    Data,
    Jobs,
    Json,
    Map,
    MethodName,
    Model,
    Quiet,
    Resume,
    Track,
    given_fields,
    mapping_of,
    method_in,
    requested,
)
from loralab.cli.options import build, with_options
from loralab.cli.tables import print_json, print_table, run_json, show_listing, show_run
from loralab.cli.working import working
from loralab.errors import ConfigError
from loralab.training.settings import Evaluation, Training
from loralab.training.trackers import chosen_trackers

if TYPE_CHECKING:
    from loralab.training.plan import Plan


@app.command()
@with_options(*METHODS, Training)
def train(
    model: Model = None,
    data: Data = None,
    output_dir: Annotated[Path | None, typer.Option(help="a new folder for the run")] = None,
    method: MethodName = None,
    map_: Map = None,
    config: ConfigFile = None,
    jobs: Jobs = None,
    resume: Resume = False,
    track: Track = None,
    quiet: Quiet = False,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Train an adapter on data, or several at once, and prove what was saved."""
    if jobs is not None:
        if config is not None:
            raise ConfigError(
                "give one of --config and --jobs; the latter has the common fields",
                code="config_and_jobs",
                field="jobs",
            )
        own = {"model": model, "data": data, "method": method, "map": map_, "track": track}
        common = {**(typed or {}), **{k: v for k, v in own.items() if v is not None}}
        from loralab.cli.jobs import train_jobs

        train_jobs(jobs, output_dir, common, resume=resume, quiet=quiet, as_json=json_)
        return
    given = given_fields(config, typed, model=model, data=data, method=method, map=map_, track=track)
    request, trackers = requested(given, config), chosen_trackers(given.get("track"))
    output = output_dir or given.get("output_dir")
    if output is None:
        raise ConfigError("give --output-dir, a new folder for the run", code="missing_option", field="output_dir")
    from loralab.cli.progress import Bar
    from loralab.training.run import train as run_training

    opening = f"loading {request['model']} and {request['data']}, and checking both"
    with Bar(quiet=quiet or json_, opening=opening) as bar:
        run = run_training(**request, output_dir=output, resume=resume, listener=bar, track=trackers)
    result = run_json(run)
    if result and json_:
        print_json(result)
    elif result:
        show_run(result)


@app.command()
@with_options(*METHODS, Training)
def plan(
    model: Model = None,
    data: Data = None,
    method: MethodName = None,
    map_: Map = None,
    config: ConfigFile = None,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Show what train would do and cost; trains nothing."""
    given = given_fields(config, typed, model=model, data=data, method=method, map=map_)
    request = requested(given, config)
    from loralab.training.plan import plan as make_plan

    with working(f"reading {request['model']} and {request['data']}", quiet=json_):
        result = make_plan(**request)
    if json_:
        print_json(result.to_json())
    else:
        _show_plan(result)


@app.command()
@with_options(Evaluation)
def evaluate(
    model: Model = None,
    data: Data = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter folder")] = None,
    map_: Map = None,
    predictions: Annotated[Path | None, typer.Option(help="write each answer here, JSONL")] = None,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Score a model, with or without an adapter, on data."""
    if data is None:
        raise ConfigError("give --data: a task name, a file, a folder or a hub id", code="missing_option", field="data")
    if model is None and adapter is None:
        model = DEFAULT_MODEL
    evaluation = build(Evaluation, typed or {})
    from loralab import atomic
    from loralab.cli.progress import Counts
    from loralab.training.evaluation import evaluate as score

    mapping = mapping_of(map_)
    with Counts(quiet=json_, opening=f"scoring {adapter or model} on {data}") as counts:
        scores = score(data=data, model=model, adapter=adapter, evaluation=evaluation, mapping=mapping, listener=counts)
    if predictions is not None:
        lines = (json.dumps(vars(p), ensure_ascii=False) for p in scores.predictions)
        atomic.write_file(predictions, "".join(line + "\n" for line in lines))
    for note in scores.notes:
        print(f"note: {note}", file=sys.stderr)
    if json_:
        print_json({"metrics": scores.metrics, "rows": scores.rows, "split": scores.split})
        return
    which = "of all" if scores.split == "all" else f"of the {scores.split} split"
    title = f"{data}, {scores.rows} rows {which}"
    print_table(title, [(name, f"{value:.4f}") for name, value in scores.metrics.items()])


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts; or one a line on standard input")] = None,
    model: Model = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="may be repeated")] = None,
    base: Annotated[bool, typer.Option(help="also ask the base model")] = True,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="a picture in front of each prompt; may be repeated")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer in tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    json_: Json = False,
) -> None:
    """Answer prompts: the base and each adapter side by side."""
    prompts = list(prompt or [])
    if not prompts and not sys.stdin.isatty():
        prompts = [line.strip() for line in sys.stdin if line.strip()]
    adapters = list(adapter or [])
    if model is None and not adapters:
        model = DEFAULT_MODEL
    from loralab.cli.progress import Counts
    from loralab.training.evaluation import generate as answer

    with Counts(quiet=json_, opening=f"answering {len(prompts)} prompts") as counts:
        found = answer(
            prompts=prompts,
            model=model,
            adapters=adapters,
            with_base=base,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            precision=precision,
            images=list(image or []),
            listener=counts,
        )
    if json_:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for entry in found:
        table = Table(title=Text(entry["prompt"]), show_lines=True)
        for name in entry["answers"]:
            table.add_column(Text(name), overflow="fold")
        table.add_row(*(Text(answer) for answer in entry["answers"].values()))
        Console().print(table)


@app.command()
def models(json_: Json = False) -> None:
    """List the models that can be named after --model, and whether they are here."""
    from loralab.models.catalog import listing

    show_listing("models; folders, GGUF files and hub ids work too", listing(), json_)


@app.command()
def tasks(json_: Json = False) -> None:
    """List the tasks that can be named after --data, and whether their data is here."""
    from loralab.tasks.catalog import listing

    show_listing("tasks; files, folders and hub ids work too", listing(), json_)


def take_method(arguments: Sequence[str]) -> None:
    """Give train and plan the options of the method that is typed, if another package has it."""
    if not {"train", "plan"} & set(arguments):
        return
    words = [w for word in arguments for w in (word.split("=", 1) if word[:2] == "--" else [word])]
    typed = dict(pairwise(words))
    name = typed.get("--method") or method_in(typed.get("--config"))
    found = None if name is None or name.lower() in NAMES else specs().get(name.lower())
    for command in (train, plan):
        command.take_options(*[found.config] if found else [])  # type: ignore[attr-defined]


def _show_plan(plan: "Plan") -> None:
    groups = Counter((m.name.rpartition(".")[2], m.kind, m.shape, m.rank, m.parameters) for m in plan.modules)
    rows = [
        (
            f"{count} x {name}",
            f"{kind} {' x '.join(map(str, shape))}, "
            + (f"rank {rank}, " if rank else "in full, ")
            + f"{parameters:,} each",
        )
        for (name, kind, shape, rank, parameters), count in groups.items()
    ]
    rows += [
        ("trained", f"{plan.trainable:,} of {plan.total:,} parameters ({plan.share:.2%})"),
        ("not adapted", f"{plan.unadapted:.0%} of the model's weights, embeddings and head included"),
        (
            "rows",
            f"{plan.rows:,}, longest {plan.longest_row} tokens"
            + (f"; {plan.dropped} left out, {plan.shortened} cut" if plan.dropped or plan.shortened else ""),
        ),
        ("steps", f"{plan.steps:,} of about {plan.tokens_per_step:,} tokens, {plan.precision}"),
        ("memory, predicted", f"{plan.peak_bytes / 1e9:.1f} GB"),
        ("time, predicted", f"{plan.seconds / 60:.1f} min"),
    ]
    if plan.smaller:
        option, peak = next(iter(plan.smaller.items()))
        rows.append(("would lower it most", f"{option}: to {peak / 1e9:.1f} GB"))
    rows += [("note", note) for note in plan.notes]
    print_table(f"{plan.model} ({plan.kind}) on {plan.data}", rows)
