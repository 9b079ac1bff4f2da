"""Short names of models: where each is, how it is got, and how its file becomes a model folder.

Standard library only. The names are registered by `loralab.assets` and by other packages, through
the entry point group "loralab.models".
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.packages import Package
from loralab.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model with a short name.

    Attributes:
        locate: returns its folder or file; None where it is not here.
        get: the command that brings it.
        convert: writes a model folder (second argument, new) from the file (first argument), where
            that is no GGUF file. It is called once for each content of the file.
        parameters: how many there are, for listings.
        package: what brings it, pinned, for `loralab assets`.
        hub: id on the model hub of what it was made from, for model cards; empty if there is none.
    """

    name: str
    kind: str
    parameters: int
    licence: str
    description: str
    get: str
    locate: Callable[[], Path | None]
    convert: Callable[[Path, Path], None] | None = None
    package: Package | None = None
    hub: str = ""


MODELS = Registry(
    NamedModel, "loralab.models", tuple(f"loralab.assets.{name}" for name in ("smollm", "minilm", "dinov2"))
)


def register(model: NamedModel) -> None:
    """Make a model known under its short name, in this process.

    Raises:
        ConfigError: the name is taken or cannot be typed.
    """
    MODELS.register(model)


def in_package(module: str, file: str) -> Callable[[], Path | None]:
    """Return the `locate` of a file or folder inside a package.

    The package is found, never imported: its own code and dependencies are not wanted.
    """

    def locate() -> Path | None:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / file
        return path if path.exists() else None

    return locate


def listing() -> list[dict[str, Any]]:
    """Return the short names, and whether their models are here."""
    shown = ("name", "kind", "parameters", "licence", "description", "get")
    return [
        {**{field: getattr(model, field) for field in shown}, "present": model.locate() is not None}
        for model in MODELS.values()
    ]
