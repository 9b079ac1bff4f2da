"""train, plan, evaluate, generate, models, tasks."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.adapters.registry import built_in, method_named, specs
from loralab.cli import app
from loralab.cli.options import build, pairs, require_known, with_options
from loralab.errors import ConfigError, LoralabError, shown
from loralab.studies.fields import from_toml
from loralab.training.settings import Evaluation, Training
from loralab.values import read_toml

if TYPE_CHECKING:
    from loralab.training.plan import Plan
    from loralab.training.run import Run

DEFAULT_MODEL = "smollm2-135m"
METHODS = [spec.config for spec in built_in().values()]
NAMES = [*built_in(), *(name for spec in built_in().values() for name in spec.variants)]
Model = Annotated[
    str | None, typer.Option(help="short name, folder, GGUF file or hub id", show_default=False)
]
Data = Annotated[
    str | None, typer.Option(help="task name, file, folder or hub id", show_default=False)
]
Map = Annotated[
    str | None,
    typer.Option("--map", help="rename columns: text=review,label=stars; stars= leaves one out"),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Quiet = Annotated[bool, typer.Option(help="no progress")]
Resume = Annotated[bool, typer.Option(help="go on from where an earlier start was cut off")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file; what is typed here overrides it")]
Jobs = Annotated[
    Path | None, typer.Option(help="TOML file of several trainings, made together on one base")
]
MethodName = Annotated[
    str | None, typer.Option(help=f"one of: {', '.join(NAMES)}", show_default=False)
]


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
    quiet: Quiet = False,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Train an adapter on data, or several at once, and prove what was saved."""
    if jobs is not None:
        if config is not None:
            raise ConfigError("give one of --config and --jobs; the latter has the common fields")
        own = {"model": model, "data": data, "method": method, "map": map_}
        common = {**(typed or {}), **{k: v for k, v in own.items() if v is not None}}
        from loralab.cli.jobs import train_jobs

        train_jobs(jobs, output_dir, common, resume=resume, quiet=quiet, as_json=json_)
        return
    given = _given(config, typed, model=model, data=data, method=method, map=map_)
    request = requested(given, config)
    output = output_dir or given.get("output_dir")
    if output is None:
        raise ConfigError("give --output-dir, a new folder for the run")
    from loralab.cli.progress import Bar
    from loralab.training.run import train as run_training

    with Bar(quiet=quiet or json_) as bar:
        run = run_training(**request, output_dir=output, resume=resume, listener=bar)
    result = run_json(run)
    if result and json_:
        _print_json(result)
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
    given = _given(config, typed, model=model, data=data, method=method, map=map_)
    request = requested(given, config)
    from loralab.training.plan import plan as make_plan

    result = make_plan(**request)
    if json_:
        _print_json(result.to_json())
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
        raise ConfigError("give --data: a task name, a file, a folder or a hub id")
    if model is None and adapter is None:
        model = DEFAULT_MODEL
    evaluation = build(Evaluation, typed or {})
    from loralab import atomic
    from loralab.training.evaluation import evaluate as score

    scores = score(
        data=data, model=model, adapter=adapter, evaluation=evaluation, mapping=_mapping(map_)
    )
    if predictions is not None:
        lines = (json.dumps(vars(p), ensure_ascii=False) for p in scores.predictions)
        atomic.write_file(predictions, "".join(line + "\n" for line in lines))
    for note in scores.notes:
        print(f"note: {note}", file=sys.stderr)
    if json_:
        _print_json({"metrics": scores.metrics, "rows": scores.rows, "split": scores.split})
        return
    which = "of all" if scores.split == "all" else f"of the {scores.split} split"
    title = f"{data}, {scores.rows} rows {which}"
    _print_table(title, [(name, f"{value:.4f}") for name, value in scores.metrics.items()])


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="or one a line on standard input")
    ] = None,
    model: Model = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="may be repeated")] = None,
    base: Annotated[bool, typer.Option(help="also ask the base model")] = True,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
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
    from loralab.training.evaluation import generate as answer

    found = answer(
        prompts=prompts, model=model, adapters=adapters, with_base=base, system=system,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, precision=precision,
    )  # fmt: skip
    if json_:
        _print_json(found)
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

    _show_listing("models; folders, GGUF files and hub ids work too", listing(), json_)


@app.command()
def tasks(json_: Json = False) -> None:
    """List the tasks that can be named after --data, and whether their data is here."""
    from loralab.tasks.catalog import listing

    _show_listing("tasks; files, folders and hub ids work too", listing(), json_)


def _given(
    config: Path | None, typed: Mapping[str, Any] | None, **own: str | None
) -> dict[str, Any]:
    """The configuration file, overridden by what was typed."""
    fields = {*own, "output_dir", *field_names()}
    stored = from_toml(config, fields) if config is not None else {}
    return {**stored, **(typed or {}), **{k: v for k, v in own.items() if v is not None}}


def requested(given: Mapping[str, Any], config: Path | None = None) -> dict[str, Any]:
    """What train() and plan() take.

    Args:
        config: a file that some of it is from, for errors.

    Raises:
        InputError: a field is missing, unknown, or has a wrong value.
    """
    try:
        return _requested(given)
    except LoralabError as error:
        if config is None:
            raise
        text = f"with --config {config}: {error}"
        raise type(error)(text, code=error.code, field=error.field) from None


def _requested(given: Mapping[str, Any]) -> dict[str, Any]:
    if "data" not in given:
        raise ConfigError("give --data: a task name, a file, a folder or a hub id")
    for name in ("model", "data", "method", "output_dir"):
        if not isinstance(given.get(name, ""), str):
            raise ConfigError(f"{name} must be a text, got {shown(given[name])}")
    spec, implied = method_named(str(given.get("method", "lora")))
    given = {**implied, **given}
    others = [other.config for other in specs().values() if other is not spec]
    require_known(given, (spec.config, Training), others, spec.name)
    columns = given.get("map", {})
    return {
        "model": given.get("model", DEFAULT_MODEL),
        "data": given["data"],
        "method": build(spec.config, given),
        "training": build(Training, given),
        "mapping": _mapping(columns) if isinstance(columns, str) else columns,
    }


def take_method(arguments: Sequence[str]) -> None:
    """Give train and plan the options of the method that is typed, if another package has it."""
    if not {"train", "plan"} & set(arguments):
        return
    words = [w for word in arguments for w in (word.split("=", 1) if word[:2] == "--" else [word])]
    typed = dict(pairwise(words))
    name = typed.get("--method") or _method_in(typed.get("--config"))
    found = None if name is None or name.lower() in NAMES else specs().get(name.lower())
    for command in (train, plan):
        command.take_options(*[found.config] if found else [])  # type: ignore[attr-defined]


def _method_in(config: str | None) -> str | None:
    """Return the method of a TOML file; what is wrong with the file is said when it is used."""
    try:
        return str(read_toml(Path(config))["method"]) if config else None
    except (LoralabError, KeyError):
        return None


def field_names() -> set[str]:
    """The fields of all methods and of Training."""
    from dataclasses import fields

    configs = (*(spec.config for spec in specs().values()), Training)
    return {field.name for config in configs for field in fields(config)}


def _mapping(text: str | None) -> dict[str, str]:
    return pairs(text, "map") if text else {}


def run_json(run: "Run") -> dict[str, Any]:
    """A run in JSON; empty in all processes but the first of several."""
    if run.certificate is None:
        return {}
    total = sum(p.numel() for p in run.base.model.parameters())
    size = sum(f.stat().st_size for f in run.output_dir.glob("adapter_model.safetensors"))
    return {
        "output_dir": str(run.output_dir), "stopped": run.stopped, "steps": run.steps,
        "best_step": run.best_step, "validation": dict(run.scores["validation"].metrics),
        "validation_rows": run.scores["validation"].rows,
        "trainable": run.adapter.num_parameters, "total": total, "adapter_bytes": size,
        "seconds": run.seconds, "tokens": run.tokens, "tokens_per_second": run.tokens_per_second,
        "peak_bytes": run.peak_bytes, "certificate": run.certificate.to_json(),
    }  # fmt: skip


def show_run(result: Mapping[str, Any]) -> None:
    """A run as a table, and what can be done next."""
    proof = result["certificate"]
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in result["validation"].items())
    folder, quoted = result["output_dir"], shlex.quote(result["output_dir"])
    _print_table(
        f"{folder}: {result['stopped']} after {result['steps']} steps",
        [
            ("validation", f"{metrics}  ({result['validation_rows']} rows)"),
            ("saved weights", f"of step {result['best_step']}"),
            ("trained", f"{result['trainable']:,} of {result['total']:,} parameters"),
            ("adapter on disk", f"{result['adapter_bytes'] / 1e6:.1f} MB"),
            ("time", f"{result['seconds']:.0f} s, {result['tokens_per_second']:.0f} tokens/s"),
            ("peak memory", f"{result['peak_bytes'] / 1e9:.2f} GB"),
            ("reloaded", f"passed; max |d logit| {proof['max_logit_difference']:.1e}, "
             f"mean KL {proof['mean_kl']:.1e}"),
        ],
    )  # fmt: skip
    print("next:")
    for command in (
        f"loralab evaluate --adapter {quoted} --data ...",
        f"loralab generate --adapter {quoted} 'a prompt'",
        f"loralab merge {quoted} {shlex.quote(folder + '-merged')}",
    ):
        print(f"  {command}")


def _show_plan(plan: "Plan") -> None:
    groups = Counter(
        (m.name.rpartition(".")[2], m.kind, m.shape, m.rank, m.parameters) for m in plan.modules
    )
    rows = [
        (f"{count} x {name}", f"{kind} {' x '.join(map(str, shape))}, "
         + (f"rank {rank}, " if rank else "in full, ") + f"{parameters:,} each")
        for (name, kind, shape, rank, parameters), count in groups.items()
    ]  # fmt: skip
    rows += [
        ("trained", f"{plan.trainable:,} of {plan.total:,} parameters ({plan.share:.2%})"),
        ("rows", f"{plan.rows:,}, longest {plan.longest_row} tokens"
         + (f"; {plan.dropped} left out, {plan.shortened} cut" if plan.dropped or plan.shortened
            else "")),
        ("steps", f"{plan.steps:,} of about {plan.tokens_per_step:,} tokens, {plan.precision}"),
        ("memory, predicted", f"{plan.peak_bytes / 1e9:.1f} GB"),
        ("time, predicted", f"{plan.seconds / 60:.1f} min"),
    ]  # fmt: skip
    if plan.smaller:
        option, peak = next(iter(plan.smaller.items()))
        rows.append(("would lower it most", f"{option}: to {peak / 1e9:.1f} GB"))
    rows += [("note", note) for note in plan.notes]
    _print_table(f"{plan.model} ({plan.kind}) on {plan.data}", rows)


def _show_listing(title: str, entries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(entries)
        return
    rows = [
        (entry["name"], f"{entry['description']}; {entry['licence']}\n"
         + ("present" if entry["present"] else f"not here; get it with: {entry['get']}"))
        for entry in entries
    ]  # fmt: skip
    _print_table(title, rows)


def _print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))
