"""Results as tables for people, and as JSON for machines."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.training.run import Run


def run_json(run: "Run") -> dict[str, Any]:
    """Return a run in JSON; empty in all processes but the first of several."""
    if run.certificate is None:
        return {}
    total = sum(p.numel() for p in run.base.model.parameters())
    size = sum(f.stat().st_size for f in run.output_dir.glob("adapter_model.safetensors"))
    return {
        "output_dir": str(run.output_dir),
        "kind": run.base.kind,
        "stopped": run.stopped,
        "steps": run.steps,
        "best_step": run.best_step,
        "validation": dict(run.scores["validation"].metrics),
        "validation_rows": run.scores["validation"].rows,
        "merges": run.adapter.can_merge,
        "trainable": run.adapter.num_parameters,
        "total": total,
        "adapter_bytes": size,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second,
        "peak_bytes": run.peak_bytes,
        "certificate": run.certificate.to_json(),
    }


def show_run(result: Mapping[str, Any]) -> None:
    """Show a run as a table, and what can be done next."""
    from loralab.models.kinds import CAUSAL

    proof = result["certificate"]
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in result["validation"].items())
    folder, quoted = result["output_dir"], shlex.quote(result["output_dir"])
    print_table(
        f"{folder}: {result['stopped']} after {result['steps']} steps",
        [
            ("validation", f"{metrics}  ({result['validation_rows']} rows)"),
            ("saved weights", f"of step {result['best_step']}"),
            ("trained", f"{result['trainable']:,} of {result['total']:,} parameters"),
            ("adapter on disk", f"{result['adapter_bytes'] / 1e6:.1f} MB"),
            ("time", f"{result['seconds']:.0f} s, {result['tokens_per_second']:.0f} tokens/s"),
            ("peak memory", f"{result['peak_bytes'] / 1e9:.2f} GB"),
            ("reloaded", f"passed; max |d logit| {proof['max_logit_difference']:.1e}, mean KL {proof['mean_kl']:.1e}"),
        ],
    )
    commands = [f"evaluate --adapter {quoted} --data ..."]
    if result["kind"] == CAUSAL:
        commands.append(f"generate --adapter {quoted} 'a prompt'")
    if result["merges"]:
        commands.append(f"merge {quoted} {shlex.quote(folder + '-merged')}")
    print("next:", *(f"loralab {command}" for command in commands), sep="\n  ")


def show_listing(title: str, entries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(entries)
        return
    rows = [
        (
            entry["name"],
            f"{entry['description']}; {entry['licence']}\n"
            + ("present" if entry["present"] else f"not here; get it with: {entry['get']}"),
        )
        for entry in entries
    ]
    print_table(title, rows)


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    width = min(len(title), console.width)  # a title is broken at the width of its table
    table = Table(title=Text(title), show_header=False, title_justify="left", min_width=width)
    for _ in range(2):
        table.add_column(overflow="fold")  # a name that was cut off could not be looked up
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


def print_columns(names: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Print rows under the names of their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in names))
    Console().print(table)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))
