"""Pooling of a sentence-transformers checkpoint: how the states of a text's tokens become one vector.

Formulas are those of its modules Transformer, Pooling and Normalize. Axes: B texts, L tokens,
H hidden size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import cached_file

from loralab.errors import ModelError, format_value, join_limited

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
# modes in the order in which several are joined, and how Pooling's older files call them
MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Steps from the states of a text's tokens to one vector; the default is the mean of its tokens, of length 1.

    Attributes:
        modes: of MODES, joined one after the other.
        max_length: tokens of a text, special ones included; 0 is what the model can take.
        prompt: what stands before every text.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = True
    max_length: int = 0
    lower_case: bool = False
    prompt: str = ""

    def written(self, text: str) -> str:
        """Return a text as the tokenizer gets it."""
        return self.prompt + (text.lower() if self.lower_case else text)

    def vectors(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the vectors of texts that are padded on the right, in fp32: (B, L, H) -> (B, H * modes)."""
        states, weights = states.float(), mask[..., None].float()
        found = torch.cat([_pooled(states, weights, mode) for mode in self.modes], dim=1)
        return F.normalize(found, dim=1) if self.normalize else found


def read_pooling(name: str, source: str) -> Pooling | None:
    """Return the pooling that a checkpoint states; None where it is not one of sentence-transformers.

    Args:
        source: its folder, or its id on a hub.

    Raises:
        ModelError: it states something that is not supported here, or its files are damaged.
    """
    modules: Any = _read(name, source, MODULES)
    if modules is None:
        return None
    paths = {_kind(module): str(module.get("path", "")) for module in modules}
    unknown = [kind for kind in paths if kind not in KNOWN_MODULES]
    if unknown or "Pooling" not in paths:
        named = f"the module {join_limited(unknown)}" if unknown else "no module Pooling"
        raise _unsupported(name, f"{MODULES} has {named}")
    transformer = _read(name, source, _inside(paths.get("Transformer", ""), "sentence_bert_config.json")) or {}
    pooling = _read(name, source, _inside(paths["Pooling"], "config.json")) or {}
    prompt = _prompt(name, _read(name, source, SETTINGS) or {})
    if prompt and pooling.get("include_prompt") is False:
        raise _unsupported(name, "its default prompt is left out of the pooling")
    length = transformer.get("max_seq_length")
    return Pooling(
        modes=_modes(name, pooling),
        normalize="Normalize" in paths,
        max_length=length if type(length) is int and length > 0 else 0,
        lower_case=transformer.get("do_lower_case") is True,
        prompt=prompt,
    )


def matryoshka(config: Any, size: int) -> tuple[int, ...]:
    """Return the lengths to which a model's vectors may be cut, as its configuration says; its own is one of them."""
    stated: Any = getattr(config, "matryoshka_dimensions", None)
    if _is_list(stated) and all(type(number) is int for number in stated):
        return (*sorted({number for number in stated if 0 < number < size}), size)
    return tuple(range(1, size + 1)) if getattr(config, "is_matryoshka", False) is True else (size,)


def _pooled(states: Tensor, weights: Tensor, mode: str) -> Tensor:
    """Return one vector of each text, (B, L, H) and (B, L, 1) -> (B, H)."""
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        last = weights.sum(dim=1).long().clamp(min=1) - 1  # (B, 1)
        return states.gather(1, last[..., None].expand(-1, 1, states.shape[2]))[:, 0]
    if mode == "max":
        return states.masked_fill(weights == 0, -1e9).amax(dim=1)
    if mode == "weightedmean":
        weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
    count = weights.sum(dim=1).clamp(min=1e-9)
    return (states * weights).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _modes(name: str, pooling: Mapping[str, Any]) -> tuple[str, ...]:
    stated = pooling.get("pooling_mode")
    if stated is None:
        names = {key: mode for mode, key in MODES.items()}
        stated = [names.get(key, key) for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    stated = [stated] if isinstance(stated, str) else stated
    if not _is_list(stated) or not stated or not all(mode in MODES for mode in stated):
        raise _unsupported(name, f"its pooling mode is {format_value(stated)}; known are {join_limited(MODES)}")
    return tuple(mode for mode in MODES if mode in stated)


def _prompt(name: str, settings: Mapping[str, Any]) -> str:
    chosen, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    if chosen is None:
        return ""
    found = prompts.get(chosen) if isinstance(prompts, dict) else None
    if not isinstance(found, str):
        raise _unsupported(name, f"{SETTINGS} has no prompt {format_value(chosen)}")
    return found


def _read(name: str, source: str, file: str) -> Any:
    """Return the content of a JSON file of a checkpoint; None where it has no such file."""
    found = cached_file(
        source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return None
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unsupported(name, f"{file} cannot be read: {error}") from None
    whole = isinstance(content, dict) or (_is_list(content) and all(isinstance(part, dict) for part in content))
    if not whole or isinstance(content, dict) == (file == MODULES):
        raise _unsupported(name, f"{file} has another form than sentence-transformers gives it")
    return content


def _inside(folder: str, file: str) -> str:
    if folder.startswith("/") or ".." in folder.split("/"):
        return file
    return f"{folder}/{file}" if folder else file


def _kind(module: Any) -> str:
    """Return the class of a module, without its package."""
    return str(module.get("type", "")).rpartition(".")[2]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _unsupported(name: str, problem: str) -> ModelError:
    return ModelError(
        f"{name} makes sentence vectors in a way that is not supported: {problem}",
        code="pooling_unsupported",
        field="model",
    )
