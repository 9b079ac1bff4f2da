"""card, push."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.app import app
from loralab.cli.arguments import Json
from loralab.cli.tables import print_json
from loralab.cli.working import working

Run = Annotated[Path, typer.Argument(help="a run, an adapter folder, a merged model or an export")]
BaseId = Annotated[str | None, typer.Option("--base-model", help="ORG/NAME of the base on the hub, if not recorded")]
Licence = Annotated[str | None, typer.Option("--license", help="such as mit (default: that of a base by short name)")]
DataId = Annotated[str | None, typer.Option("--dataset", help="ORG/NAME of the data on the hub, if not recorded")]


@app.command()
def card(
    run: Run,
    repo: Annotated[str | None, typer.Option(help="ORG/NAME that it will have on the hub")] = None,
    base_model: BaseId = None,
    license_: Licence = None,
    dataset: DataId = None,
    overwrite: Annotated[bool, typer.Option(help="also a README.md that somebody has written or changed")] = False,
    json_: Json = False,
) -> None:
    """Write the model card of an artefact, as hubs read it, to its README.md."""
    from loralab.artefacts.card import card as write_card

    with working(f"writing the card of {run}", quiet=json_):
        made = write_card(run, base_model=base_model, license=license_, dataset=dataset, repo=repo, overwrite=overwrite)
    if json_:
        print_json({"path": str(made.path), "metadata": made.metadata})
    else:
        print(made.path)


@app.command()
def push(
    run: Run,
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub; made if it is not there")],
    public: Annotated[bool, typer.Option("--public", help="a new repository that everybody can read")] = False,
    base: Annotated[str | None, typer.Option(help="the base model to verify it with, if not the one it names")] = None,
    base_model: BaseId = None,
    license_: Licence = None,
    dataset: DataId = None,
    json_: Json = False,
) -> None:
    """Verify an artefact, write its card and upload both to a model hub; private unless --public."""
    from loralab.integrations.hub import push as send

    with working(f"verifying {run}, then sending it to {repo}", quiet=json_):
        sent = send(run, repo, private=not public, base=base, base_model=base_model, license=license_, dataset=dataset)
    for note in sent.notes:
        print(f"note: {note}", file=sys.stderr)
    if json_:
        print_json(vars(sent))
    else:
        print(sent.url)
