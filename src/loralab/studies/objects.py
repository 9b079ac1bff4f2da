"""A live model and rows in memory, written into the study folder, where every process reads them.

A study names its model and its data in study.toml, so what has no name gets one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.artefacts.temporary_base import write_base
from loralab.errors import AdapterStateError, DataError
from loralab.models.given import Given, given, restored_after
from loralab.studies.study import StudyOptions
from loralab.tasks import catalog
from loralab.tasks.catalog import LABELLED, Task

FOLDER, MODEL, DATA = "objects", "model", "rows.json"  # in a study folder


@dataclass(frozen=True)
class Objects:
    """A model and rows to be written into `folder`, within a study's; None where a name was given."""

    folder: Path
    model: Given | None = None
    data: Mapping[str, Any] | None = None

    @staticmethod
    def of(folder: Path, model: Any, tokenizer: Any, data: Any, mapping: Mapping[str, str] | None) -> "Objects":
        """Look at what was given; nothing is written.

        Raises:
            InputError: it is no model or no data, or cannot be written as it is.
        """
        own = None if model is None else given(str(model) if isinstance(model, Path) else model, tokenizer)
        if own is not None:
            _require_bare(own)
        named = data is None or isinstance(data, str | Path)
        return Objects(folder.resolve() / FOLDER, own, None if named else _rows(data, mapping))

    def named_in(self, asked: StudyOptions, model: Any, data: Any) -> StudyOptions:
        """Return what a study is asked, with names alone."""
        if model is not None:
            asked = replace(asked, model=str(self.folder / MODEL if self.model else model))
        if data is not None:
            asked = replace(asked, data=str(self.folder / DATA if self.data is not None else data))
        return asked

    def write(self) -> None:
        """Write what has no name; what another start has left is replaced, and later compared.

        Raises:
            OutputError: it cannot be written.
        """
        if self.data is not None:
            content = json.dumps(self.data, ensure_ascii=False, indent=1)
            atomic.write_file(self.folder / DATA, content + "\n")
        if self.model is not None:
            own = self.folder / MODEL
            with restored_after(self.model), atomic.explained(own):
                base = self.model.base()
                atomic.remove_folder(own)
                with atomic.new_folder(own) as place:
                    write_base(base.model, place, base.tokenizer)


def _require_bare(own: Given) -> None:
    """Refuse a model with an adapter: its base would be studied, and not what it is."""
    if any(hasattr(module, "merge_weights") for module in own.model.modules()):
        message = f"{own.name} carries an adapter; a study begins without one: detach() it first"
        raise AdapterStateError(message, code="adapted", field="model")


def _rows(data: Any, mapping: Mapping[str, str] | None) -> dict[str, Any]:
    """Return rows in memory as a .json file holds them.

    Raises:
        DataError: they are pictures, or have a question of their own.
    """
    table, question = catalog.table_of(data, mapping)
    if table.format == "image-label":
        hint = "save them in folders that are named after their classes, and give that folder"
        raise DataError(f"pictures in memory cannot be studied; {hint}", code="pictures_in_memory", field="data")
    labelled = isinstance(data, Task) and data.format in LABELLED
    if question not in ("", catalog.question_of(data.format, data.labels) if labelled else ""):
        message = f"the task {table.source!r} has a question of its own, which a file of rows cannot hold"
        raise DataError(f"{message}; give its name, or its rows", code="own_question", field="data")
    return dict(table.splits)
