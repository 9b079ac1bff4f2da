"""Folder that an adapted model's own `save_pretrained` writes, as transformers' Trainer calls it too.

The method of the class would write the wrappers' tensors (`q_proj.base.weight`) under the plain
model's name: whoever reads that draws the adapted layers at random. So as long as an adapter is
attached, the adapter folder is written in its place, and the plain model while it is merged.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from loralab.adapters.folder import CONFIG, RECORD, read_json, write_json
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.wrapper import Wrapper, replace_modules
from loralab.errors import AdapterStateError, OutputError

METHOD = "save_pretrained"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
STATE = "model.safetensors"  # as Trainer fills it in; in a checkpoint, of the adapter alone
STATE_METADATA = {"format": "pt", "loralab": "adapter state"}


class SaveAdapter:
    """Stands as `save_pretrained` on a model with an adapter; a copy of the model copies it.

    Args:
        save: writes the adapter folder, or the plain model, whatever the adapter's state asks for.
    """

    def __init__(self, model: Any, save: Callable[..., Any]) -> None:
        self.model, self.save = model, save
        model.__dict__[METHOD] = self

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> Any:
        """Write what belongs into the folder; the tensors are the model's own, not `state_dict`'s.

        Raises:
            AdapterStateError: it is asked to push to a hub.
            OutputError: the folder holds what does not go together with it.
        """
        if push_to_hub:
            raise AdapterStateError(
                "save_pretrained of a model with an adapter does not push; save, then push the folder",
                code="not_pushed",
                field="push_to_hub",
            )
        return self.save(Path(save_directory), options) if is_main_process else None

    def remove(self) -> None:
        """Give the model its own method back."""
        del self.model.__dict__[METHOD]


class RefuseToSave(SaveAdapter):
    """Stands on a model within an adapted model, which has part of the adapter."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, self._refuse)

    def _refuse(self, folder: Path, options: Any) -> None:
        raise AdapterStateError(
            f"{type(self.model).__name__} is part of a model with an adapter; save the whole, or "
            "detach() the adapter first",
            code="part_of_adapted",
            field="save_directory",
        )


def saving_adapters(model: nn.Module, save: Callable[..., Any]) -> list[SaveAdapter]:
    """Replace `save_pretrained` on a model and on the adapted models within it."""
    found = []
    for module in model.modules():
        if not callable(getattr(type(module), METHOD, None)):
            continue
        if module is model:
            found.append(SaveAdapter(module, save))
        elif any(isinstance(m, Wrapper | TrainedInFull) for m in module.modules()):
            found.append(RefuseToSave(module))
    return found


def require_no_model(folder: Path) -> None:
    """Refuse an adapter beside a whole model, which would be loaded without it.

    The state of an adapter that stood there is removed: it would be that of another step.
    """
    if holds_state(folder):
        (folder / STATE).unlink()
    if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise OutputError(
            f"{folder} holds a whole model; save the adapter elsewhere", code="folder_taken", field="save_directory"
        )


def holds_state(folder: Path) -> bool:
    """Return whether the weights in a folder are the state of an adapter, and no whole model."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            return bool(file.metadata() == STATE_METADATA)
    except (OSError, SafetensorError):
        return False


@contextmanager
def keeping_record(folder: Path) -> Iterator[None]:
    """Leave loralab.json as it was where the same adapter is written again: it may be certified."""
    file = folder / RECORD
    before = read_json(file) if file.is_file() else {}
    yield
    if _identity(before) == _identity(read_json(file)):
        write_json(file, before)


def _identity(record: Any) -> tuple[Any, Any]:
    """Return the digest of an adapter, and the fingerprint of its base."""
    base = record.get("base")
    return record.get("digest"), base.get("fingerprint") if isinstance(base, dict) else None


def write_merged(model: nn.Module, wrappers: Sequence[Any], folder: Path, options: Mapping[str, Any]) -> Any:
    """Write the plain model, as its own `save_pretrained` does, with what its merged wrappers would leave.

    Raises:
        OutputError: the folder holds an adapter, which would be added once more.
    """
    if (folder / CONFIG).exists():
        raise OutputError(
            f"{folder} holds an adapter; save the merged model elsewhere", code="folder_taken", field="save_directory"
        )
    finished = {wrapper: _finished(wrapper) for wrapper in wrappers}
    replace_modules(model, finished)
    try:
        with untied(model):
            write_model: Any = type(model)
            return write_model.save_pretrained(model, folder, **options)
    finally:
        replace_modules(model, {plain: wrapper for wrapper, plain in finished.items()})


def _finished(wrapper: Any) -> nn.Module:
    """Return the module that a merged wrapper leaves, without changing the wrapper."""
    if isinstance(wrapper, TrainedInFull):
        return copy.deepcopy(wrapper.trained).to(wrapper.dtype)
    plain: nn.Module = wrapper.finished()
    return plain


@contextmanager
def untied(model: Any) -> Iterator[None]:
    """Say in the configuration that a head has a weight of its own, where it has one now."""
    configurations = [model.config, model.config.get_text_config()]
    tied = [c for c in configurations if getattr(c, "tie_word_embeddings", False)]
    if not has_own_head(model):
        tied = []
    for config in tied:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in tied:
            config.tie_word_embeddings = True


def has_own_head(model: Any) -> bool:
    """Return whether the output head has numbers of its own, which a file holds beside the embedding's.

    Two parameters may have the same numbers in memory, as those of merged full fine-tuning have.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
