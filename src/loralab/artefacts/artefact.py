"""An artefact as its folder tells it: an adapter, a merged model, or an adapter for llama.cpp.

No model is loaded. Places on this machine are not told: of a file or folder the last part alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, as its documentation has it

from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, RECORD, AdapterFolder
from loralab.adapters.record import sound
from loralab.adapters.registry import spec_of
from loralab.errors import AdapterFileError, one_line
from loralab.models import kinds
from loralab.models.catalog import MODELS

SNAPSHOT = re.compile(r"/models--([\w.\-]+?)--([\w.\-]+)/snapshots/")
ADAPTER, MERGED, GGUF = "adapter", "merged", "gguf"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A folder and what it records.

    Attributes:
        record: content of loralab.json; empty of a folder of another tool.
        form: adapter, merged or gguf.
        stored: content of an adapter folder; None of the other forms.
        base_id: of the base on the hub; None where it has none that is known.
        data_id: of the data on the hub, likewise.
        repo: that the folder will have on the hub; None where that is not known.
    """

    path: Path
    record: Mapping[str, Any]
    form: str = ADAPTER
    stored: AdapterFolder | None = None
    base_id: str | None = None
    data_id: str | None = None
    repo: str | None = None

    def part(self, name: str) -> Mapping[str, Any]:
        """Return a section of the record; empty if it has none."""
        found = self.record.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def name(self) -> str:
        """Return the last part of its id on the hub, or of its path."""
        return _last_part(self.repo or str(self.path.resolve()))

    @property
    def kind(self) -> str:
        """Return the kind of its base model; a language model where that is not recorded."""
        return self.part("base").get("kind") or kinds.CAUSAL

    @property
    def method(self) -> str:
        """Return the name of its method as trained; empty where there is no adapter to read."""
        if self.stored is None:
            return ""
        trained = self.part("method").get("name")
        return trained if isinstance(trained, str) and trained else spec_of(self.stored.config).name

    @property
    def short_name(self) -> str:
        """Return the short name of its base; empty if it has none."""
        name = str(self.part("base").get("name") or "")
        return name if name in MODELS else ""

    @property
    def base_name(self) -> str:
        """Return how people are told of its base; empty if nothing is known."""
        fields = self.stored.fields if self.stored else {}
        name = self.part("base").get("name") or fields.get("base_model_name_or_path") or ""
        return self.base_id or _last_part(str(name))

    @property
    def data_name(self) -> str:
        """Return how people are told of its data; empty if nothing is known."""
        return self.data_id or _last_part(str(self.part("task").get("name") or ""))


def read_artefact(
    path: Path, *, base_id: str | None = None, data_id: str | None = None, repo: str | None = None
) -> Artefact:
    """Return what a folder tells.

    Args:
        base_id: of the base on the hub; None is what the folder records.
        data_id: of the data; None is the recorded name, if the hub's cache has such data.

    Raises:
        AdapterFileError: it is no artefact, or is damaged.
    """
    stored, form = None, ADAPTER
    if (path / CONFIG).is_file():
        stored = folder.read(path)
        record = stored.record
    elif (path / RECORD).is_file():
        record = sound(folder.read_json(path / RECORD))
        form = MERGED if record.get("kind") == "model" else GGUF
    else:
        text = f"{path} has neither {CONFIG} nor {RECORD}; a card is of a run, a merged model or an export"
        raise AdapterFileError(text, code="no_record", field="run")
    base, task = record.get("base", {}), record.get("task", {})
    name = base.get("name") or (stored.fields.get("base_model_name_or_path") if stored else None)
    return Artefact(
        path=path,
        record=record,
        form=form,
        stored=stored,
        base_id=base_id or model_id(name),
        data_id=data_id or _cached_data(task.get("name")),
        repo=repo,
    )


def is_hub_id(name: str) -> bool:
    """Return whether a text is like ORG/NAME, as the hub takes it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def model_id(name: Any) -> str | None:
    """Return the id on the hub that a recorded name of a base stands for; None if it stands for none."""
    if not isinstance(name, str):
        return None
    if name in MODELS:
        return MODELS[name].hub or None
    if found := SNAPSHOT.search(Path(name).as_posix()):
        return f"{found[1]}/{found[2]}"
    return name if is_hub_id(name) else None  # folders are recorded as absolute paths


def _cached_data(name: Any) -> str | None:
    """Return a recorded name of data if it is that of the hub: it is also how a file would be called."""
    if not isinstance(name, str) or not is_hub_id(name):
        return None
    place = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return name if place.is_dir() else None


def _last_part(name: str) -> str:
    return one_line(name.replace("\\", "/").rstrip("/").rpartition("/")[2])
