"""The command that all others are added to."""

import os
from typing import Annotated

import typer

from loralab import __version__

app = typer.Typer(
    name="loralab",
    help="The laboratory for low-rank adaptation: adapt, train, prove, compare.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"loralab {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="the version")
    ] = False,
    debug: Annotated[bool, typer.Option(help="show the traceback of an error")] = False,
) -> None:
    if debug:
        os.environ["LORALAB_DEBUG"] = "1"
