"""push(): an artefact onto a model hub, once it is proven again.

Everything that is read of an account is read by huggingface_hub, as its own tools do it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from loralab.adapters.folder import CONFIG, RECORD, TENSORS
from loralab.artefacts.artefact import Artefact, read_artefact
from loralab.artefacts.card import README, card, is_somebodys, require_ids
from loralab.artefacts.certificate import REFERENCE, certified_record, verify
from loralab.errors import ConfigError, LoralabError, TransferError

PROVEN = (RECORD, REFERENCE, README)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where an artefact is now, what went there, and what the owner should know of it."""

    url: str
    repo: str
    private: bool
    files: tuple[str, ...]
    notes: tuple[str, ...]


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = True,
    base: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    message: str = "Upload by loralab",
) -> Pushed:
    """Verify an artefact against its certificate, write its card, and upload both.

    Of a run what belongs to the adapter is sent, no checkpoints and no logs. A README.md that somebody
    has written is sent as it is.

    Args:
        repo: ORG/NAME; made if it is not there.
        private: whether a new one can be seen by its owner alone.
        base: the base model to verify an adapter with; None is the one that it names.
        base_model, license, dataset: of the card, as `card` takes them.
        message: of the commit.

    Raises:
        InputError: the folder is no artefact with a certificate, or the repository is public already.
        CertificateError: it no longer does what was certified; nothing has been sent.
        TransferError: the hub cannot be reached, or refuses.
    """
    require_ids(repo=repo, base_model=base_model, dataset=dataset)
    path, api = Path(run), huggingface_hub.HfApi()
    certified_record(path)
    if written := is_somebodys(path / README):
        _require_no_effect(path / README, base_model=base_model, license=license, dataset=dataset)
    with _explained(repo):
        api.whoami()
        private = _visibility(api, repo, private)
    verify(path, base=base)
    if not written:
        card(path, base_model=base_model, license=license, dataset=dataset, repo=repo)
    artefact = read_artefact(path)
    files = files_of(artefact)
    with _explained(repo):
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repo, folder_path=path, allow_patterns=list(files), ignore_patterns=["*/*"], commit_message=message
        )
    return Pushed(url=url, repo=repo, private=private, files=files, notes=tuple(_notes(artefact)))


def files_of(artefact: Artefact) -> tuple[str, ...]:
    """Return the files of an artefact, of which checkpoints, logs and settings of a run are none."""
    own = (CONFIG, TENSORS) if artefact.stored else artefact.part("files")
    return tuple(sorted(name for name in {*own, *PROVEN} if (artefact.path / name).is_file()))


def _require_no_effect(file: Path, **given: str | None) -> None:
    """Refuse fields of a card that is not written.

    Raises:
        ConfigError: one is given.
    """
    for name, value in given.items():
        if value is not None:
            text = f"{name} is of a card, and {file} was written or changed by somebody, and is sent as it is"
            raise ConfigError(f"{text}; `loralab card --overwrite` replaces it", code="no_effect", field=name)


def _visibility(api: Any, repo: str, private: bool) -> bool:
    """Return whether a repository is private, or will be when it is made.

    Raises:
        ConfigError: it is there, and public, where it should be private.
    """
    try:
        found = bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        return private
    if private and not found:
        raise ConfigError(f"{repo} is public already; --public sends to it", code="already_public", field="private")
    return found


def _notes(artefact: Artefact) -> Iterator[str]:
    if sample := artefact.record.get("sample"):
        yield f"{RECORD} and {REFERENCE} hold {len(sample)} prompts of the data, as token ids"
    base = artefact.part("base").get("name")
    if isinstance(base, str) and Path(base).is_absolute():
        yield f"the base is recorded as {base}, which is here alone; others give theirs with --base or --model"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raise one line of ours for whatever the client and the network raise.

    Raises:
        TransferError: nothing has been sent, or not all of it.
    """
    try:
        yield
    except LoralabError:
        raise
    except LocalTokenNotFoundError:
        text = "the hub does not know who asks; log in with `hf auth login` first"
        raise TransferError(text, code="not_logged_in", field="repo") from None
    except Exception as error:  # the client's own, the HTTP library's, the system's
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        code = "not_reached" if status is None else "refused"
        found = "cannot be reached" if status is None else f"answers {status}"
        raise TransferError(f"{repo} was not pushed: the hub {found} ({what})", code=code, field="repo") from error
