"""merge, export, check, verify, audit, inspect."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.cli.app import app
from loralab.cli.arguments import Json, Model
from loralab.cli.tables import print_json, print_table
from loralab.cli.working import working

if TYPE_CHECKING:
    from loralab.artefacts.audit.report import AuditReport
    from loralab.artefacts.comparison import Certificate
    from loralab.artefacts.engines import Verdict
    from loralab.artefacts.proof.report import MergeReport

AdapterPath = Annotated[Path, typer.Argument(help="an adapter folder")]
OutputPath = Annotated[Path, typer.Argument(help="a new folder")]
MOST_SHOWN = 12  # tensors that are named
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; that of the training if left out")]


@app.command()
def merge(
    adapter: AdapterPath,
    output: OutputPath,
    model: Model = None,
    precision: Precision = None,
    quantize: Annotated[str, typer.Option(help="none, or nf4: pack the merged weights")] = "none",
    force: Annotated[bool, typer.Option(help="even if 4 bits round the update away")] = False,
    json_: Json = False,
) -> None:
    """Put an adapter into the base's weights: a full model folder, with its certificate."""
    from loralab.artefacts.merge import merge as run_merge
    from loralab.cli.progress import Counts

    opening = f"merging {adapter}, and comparing the merged model in a fresh process"
    with Counts(quiet=json_, opening=opening) as counts:
        certificate = run_merge(
            adapter, output, model=model, precision=precision, quantize=quantize, force=force, listener=counts
        )
    _show_certificate(output, certificate, json_)


@app.command()
def export(
    adapter: AdapterPath,
    output: OutputPath,
    to: Annotated[str, typer.Option(help="peft, vllm, gguf (for llama.cpp) or merged")],
    model: Model = None,
    precision: Precision = None,
    json_: Json = False,
) -> None:
    """Write an adapter in another form, with its certificate."""
    from loralab.artefacts.export import export as run_export
    from loralab.cli.progress import Counts

    opening = f"writing {adapter} for {to}, and comparing it in a fresh process"
    with Counts(quiet=json_, opening=opening) as counts:
        certificate = run_export(adapter, output, to=to, model=model, precision=precision, listener=counts)
    _show_certificate(output, certificate, json_)


@app.command()
def check(
    adapter: AdapterPath,
    target: Annotated[str, typer.Option("--for", help="vllm, gguf (llama.cpp) or peft")],
    model: Model = None,
    json_: Json = False,
) -> None:
    """Check what another engine would refuse or leave out of an adapter; exit 0 if nothing."""
    from loralab.artefacts.engines import check as run_check

    verdict = run_check(adapter, target=target, model=model)
    if json_:
        print_json({"path": str(adapter), **verdict.to_json()})
    else:
        _show_verdict(adapter, verdict)
    if not verdict.as_it_is:
        raise typer.Exit(1)


@app.command()
def verify(
    artefact: Annotated[Path, typer.Argument(help="an adapter folder or a merged model")],
    base: Annotated[str | None, typer.Option(help="the base model; the one that the adapter names if left out")] = None,
    adapter: Annotated[Path | None, typer.Option(help="the adapter that was merged, by any tool")] = None,
    logits: Annotated[bool, typer.Option(help="of a merge, compare logits too where the models can be opened")] = True,
    json_: Json = False,
) -> None:
    """Compare an artefact with its certificate, or with --adapter a merge of any tool with base and adapter.

    Of a merge every tensor is compared with base + s B A. Exit code 0: proven; 1: it is not what base
    and adapter make; 2: the input is wrong, such as a missing shard; 3: it cannot be decided.
    """
    from loralab.artefacts.verify import verify as run_verify
    from loralab.cli.progress import Counts

    if adapter is None:
        options: dict[str, Any] = {} if logits else {"logits": False}
        opening = f"reloading {artefact} in a fresh process, to compare it with its certificate"
        with Counts(quiet=json_, opening=opening) as counts:
            certificate = run_verify(artefact, base=base, listener=counts, **options)
        _show_certificate(artefact, certificate, json_)
        return
    opening = f"comparing every tensor of {artefact} with base and adapter, then the logits"
    with Counts(quiet=json_, opening=opening) as counts:
        report = run_verify(artefact, base=base, adapter=adapter, logits=logits, listener=counts)
    _conclude(report, _show_merge, json_)


@app.command()
def audit(
    adapter: AdapterPath,
    base: Annotated[str | None, typer.Option(help="the base model; the one that the adapter names if left out")] = None,
    engines: Annotated[str, typer.Option(help="whom to ask, with commas")] = "ours,peft,vllm,llama.cpp",
    data: Annotated[
        str | None, typer.Option(help="rows whose prompts are asked; the adapter's own if left out")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, that the engines compute in")] = "fp32",
    output: Annotated[Path | None, typer.Option(help="a folder for audit.html and audit.json")] = None,
    json_: Json = False,
) -> None:
    """Ask every engine that is installed for the same answers, and compare them with fp32 eager.

    What rounding explains is measured on the same prompts. Exit code 0: all agree; 1: one does not;
    2: the input is wrong; 3: an engine gave no answer, or the adapter does less than rounding.
    """
    from loralab.artefacts.audit.audit import audit as run_audit

    names = [name.strip() for name in engines.split(",") if name.strip()]
    with working(f"asking engines about {adapter}", quiet=json_):
        report = run_audit(
            adapter,
            base=base,
            engines=names,
            data=data,
            precision=precision,
            output=output,
            listener=lambda name: print(f"asking {name}", file=sys.stderr),
        )
    _conclude(report, _show_audit, json_)


@app.command()
def inspect(
    adapter: AdapterPath,
    other: Annotated[Path | None, typer.Argument(help="a second one, to compare with")] = None,
    json_: Json = False,
) -> None:
    """Look into an adapter: size, norms, spectrum; with a second one, subspace overlap."""
    from loralab.artefacts.inspect import inspect as run_inspect

    found = run_inspect(adapter, other)
    if json_:
        print_json(found)
    elif other is None:
        _show_summary(found)
    else:
        _show_overlap(found)


def _show_certificate(path: Path, certificate: "Certificate", as_json: bool) -> None:
    if as_json:
        print_json({"path": str(path), **certificate.to_json()})
        return
    allowed = certificate.tolerance
    print_table(
        f"{path}: {'passed' if certificate.passed else 'FAILED'} in {certificate.precision}",
        [
            ("compared", f"{certificate.prompts} prompts, {certificate.positions} positions"),
            ("max |d logit|", f"{certificate.max_logit_difference:.2e}"),
            ("relative", f"{certificate.relative_difference:.2e}  (at most {allowed['relative_difference']:.1e})"),
            ("mean KL", f"{certificate.mean_kl:.2e} nats  (at most {allowed['mean_kl']:.1e})"),
            ("same top answer", f"{certificate.top1_agreement:.1%}  (at least {allowed['top1_agreement']:.0%})"),
        ],
    )


def _conclude(report: Any, show: Callable[[Any], None], as_json: bool) -> None:
    """Show a report, and exit with 1 if it did not pass, 3 if it decided nothing."""
    if as_json:
        print_json(report.to_json())
    else:
        show(report)
    if not report.passed:
        raise typer.Exit(1 if report.decided else 3)


def _show_audit(report: "AuditReport") -> None:
    word = "all agree" if report.passed else "NOT all agree" if report.decided else "not decided"
    rows = [("compared", f"{report.prompts} prompts ({report.rows}), {report.positions} positions, with fp32 eager")]
    for own in report.engines:
        found, most, text = own.distance, own.allowed, own.verdict
        if found is not None and most is not None:
            text += f" in {own.precision}: mean KL {found.mean_kl:.1e} (at most {most.mean_kl:.1e}), worst "
            text += f"{found.worst_kl:.1e} (at most {most.worst_kl:.1e}), same top answer {found.top1:.1%}"
        rows.append((own.engine, f"{text}; {own.detail}" if own.detail else text))
    rows.append(("without adapter", f"mean KL {report.without.mean_kl:.1e}, same top answer {report.without.top1:.1%}"))
    rows += [("note", note) for note in report.notes]
    print_table(f"{report.adapter}: {word}", rows)


def _show_merge(report: "MergeReport") -> None:
    word = "proven" if report.passed else "NOT proven" if report.decided else "not decidable"
    rows = [("tensors", ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items()))]
    rows += [("rounded", f"{order}  ({count} tensors)") for order, count in report.orders.items()]
    if report.survived is not None:
        rows.append(("update left", f"{report.survived:.1%} after quantisation"))
    odd = (*report.wrong, *report.undecided)
    rows += [(own.name, f"{own.cause.replace('_', ' ')}: {own.detail}") for own in odd[:MOST_SHOWN]]
    if len(odd) > MOST_SHOWN:
        rows.append(("", f"and {len(odd) - MOST_SHOWN} more; --json has all"))
    if (own := report.logits) is not None:
        compared = f"relative difference {own.relative_difference:.2e}, mean KL {own.mean_kl:.2e} nats"
        rows.append(("logits", f"{compared}, on {own.positions} positions; {'passed' if own.passed else 'FAILED'}"))
    rows += [("note", note) for note in report.notes]
    print_table(f"{report.merged}: {word}", rows)


def _show_verdict(adapter: Path, verdict: "Verdict") -> None:
    quoted = shlex.quote(str(adapter))
    ways = {
        "export": f"loralab export {quoted} FOLDER --to {verdict.target}",
        "merge": f"loralab merge {quoted} FOLDER, and serve the merged model",
        "none": "none; loralab serve has it",
        "unserved": "none; loralab evaluate runs it",
    }
    rows = [("as it is", "yes" if verdict.as_it_is else "no")]
    rows += [(one.what, ways[one.remedy]) for one in verdict.obstacles]
    rows += [("note", note) for note in verdict.notes]
    print_table(f"{adapter} for {verdict.target}", rows)


def _show_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [
        ("method", summary["method"]),
        ("base", f"{summary['base']}  fingerprint {summary['fingerprint']}"),
        ("digest", summary["digest"]),
        ("parameters", f"{summary['parameters']:,}"),
        ("trained in full", ", ".join(summary["saved"]) or "nothing"),
    ]
    if summary["modules"]:
        ranks = ", ".join(map(str, summary["ranks"]))
        rows.insert(4, ("low-rank updates", f"{len(summary['modules'])}, ranks {ranks}"))
    if how := summary.get("merge_aware"):
        rows.append(("trained for", f"a merge into {how}, whose losses its metrics are"))
    print_table(summary["path"], rows)
    if summary["modules"]:
        _show_updates(summary["modules"])
    if summary["tensors"]:
        table = Table("tensor", "shape", "norm")
        for row in summary["tensors"]:
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(row["name"], shape, f"{row['norm']:.4f}")
        Console().print(table)


def _show_updates(modules: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "rank", "norm", "top singular values", "effective rank", "90 % at")
    for row in modules:
        values = " ".join(f"{value:.3f}" for value in row["singular_values"][:4])
        table.add_row(
            row["name"],
            str(row["rank"]),
            f"{row['norm']:.4f}",
            values,
            f"{row['effective_rank']:.2f}",
            str(row["rank_at_90"]),
        )
    Console().print(table)


def _show_overlap(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "ranks", "overlap of inputs", "chance", title="subspace overlap (phi)")
    for row in rows:
        table.add_row(
            row["name"], f"{row['ranks'][0]}, {row['ranks'][1]}", f"{row['overlap']:.3f}", f"{row['chance']:.3f}"
        )
    Console().print(table)
