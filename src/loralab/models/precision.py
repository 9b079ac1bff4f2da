"""Precision of a loaded model: one dtype for its parameters, the base's own statistics."""

import types
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from loralab.errors import ModelError

_FP32_ALONE = ("fnet",)  # Fourier transforms know no bf16
_KEPT = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # of transformers' models


def require_precision(name: str, config: Any, dtype: torch.dtype) -> None:
    """Refuse what a family cannot compute in.

    Raises:
        ModelError: it computes in fp32 alone.
    """
    if config.model_type in _FP32_ALONE and dtype != torch.float32:
        raise ModelError(
            f"{name} ({config.model_type}) computes in fp32 alone; say --precision fp32",
            code="precision_unsupported",
            field="precision",
        )


def require_whole_blocks(name: str, model: Any) -> None:
    """Refuse weights in 4 bits that bitsandbytes misreads on a processor: rows of no whole blocks.

    With AVX-512 it takes every row to begin with a scale of its own.

    Raises:
        ModelError: the model has such rows, on a processor.
    """
    for path, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None and weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise ModelError(
                f"{name}: {path} has rows of {state.shape[-1]} weights, no whole blocks of {state.blocksize}, which "
                "bitsandbytes misreads on a processor; take the model in 16 bits",
                code="uneven_blocks",
                field="model",
            )


def cast(model: Any, dtype: torch.dtype) -> None:
    """Bring the parameters to one dtype, but those that a family keeps in fp32 on purpose.

    A few families make theirs with a dtype of their own, and transformers leaves them so; XLNet
    cannot compute with both.
    """
    kept = {name for key in _KEPT for name in getattr(model, key, None) or ()}
    for name, parameter in model.named_parameters():
        odd = parameter.is_floating_point() and parameter.dtype != dtype
        if odd and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)


def keep_statistics(model: nn.Module) -> None:
    """Let batch norms go by the base's statistics in training too: no adapter could store others.

    By those of a batch, what is trained would meet other numbers than what is used afterwards.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.__dict__["train"] = types.MethodType(_stays, module)


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
