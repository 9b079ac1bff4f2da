"""The towers of multimodal checkpoints: what turns pictures and sound into input of the text part.

Adapting "every linear layer" of a language model that can also see means its language part. Models
of which the towers are the whole (CLIP, SigLIP), and pure vision or speech models, have none.
"""

from typing import Any

from torch import nn

from loralab.adapters.paths import inside

MODALITIES = ("vision", "audio", "image", "speech", "video", "vit_", "qformer", "perceiver", "vq_")


def tower_of(model: Any, names: list[str], heads: list[str]) -> dict[str, str]:
    """Return which of some paths belong to a tower or what connects it -> the path of that part."""
    text, others = _configurations(model)
    if not others or not _writes_text(model):
        return {}
    modules = [(path, m) for path, m in model.named_modules() if path]
    language = _outermost([path for path, m in modules if _has(m, [text])])
    if language:
        keep = (*language, *heads)
        outside = [name for name in names if not inside(name, keep)]
        return {name: _part(name, keep) for name in outside}
    towers = _outermost([path for path, m in modules if _has(m, others)])
    return {name: next(t for t in towers if inside(name, [t])) for name in names if inside(name, towers)}


def _configurations(model: Any) -> tuple[Any, list[Any]]:
    """Return the configuration of the language part, where it is one of its own, and of the towers."""
    own = vars(getattr(model, "config", None) or object)
    parts = {key: value for key, value in own.items() if hasattr(value, "model_type")}
    others = [value for key, value in parts.items() if key.startswith(MODALITIES)]
    return parts.get("text_config"), others


def _writes_text(model: Any) -> bool:
    generates = getattr(model, "can_generate", None)
    return hasattr(model, "language_model") or (callable(generates) and bool(generates()))


def _has(module: nn.Module, configurations: list[Any]) -> bool:
    own: Any = getattr(module, "config", None)
    return own is not None and any(type(own) is type(one) for one in configurations)


def _outermost(paths: list[str]) -> list[str]:
    found: list[str] = []
    for path in paths:  # in the model's order, parents first
        if not inside(path, found):
            found.append(path)
    return found


def _part(name: str, keep: tuple[str, ...]) -> str:
    """Return the longest way up from a layer that meets nothing of the language part."""
    parts = name.split(".")
    ways = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next(way for way in ways if not any(k.startswith(f"{way}.") for k in keep))
