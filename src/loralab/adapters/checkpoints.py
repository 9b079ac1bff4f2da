"""Gradients that reach adapters through reentrant checkpoints although the embedding is frozen."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class KeepGradients:
    """Makes the output of the embedding ask for gradients where a model checkpoints its blocks.

    A reentrant checkpoint drops all gradients if no *input* of its block needs one. This hook
    asks at each call, so it does not matter whether checkpointing is enabled before or after.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # it makes a graph of its own of a checkpoint
            return
        modules = self.model.modules()
        checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in modules)
        if checkpoints and torch.is_grad_enabled() and isinstance(output, Tensor):
            output.requires_grad_(True)


def keep_gradients(model: nn.Module) -> RemovableHandle | None:
    """Register the hook; None for a model that has no embedding."""
    get_input = getattr(model, "get_input_embeddings", None)
    embedding = None
    if callable(get_input):
        try:
            embedding = get_input()
        except NotImplementedError:  # models without one, such as plain classifiers
            embedding = None
    if not isinstance(embedding, nn.Module):
        return None
    return embedding.register_forward_hook(KeepGradients(model))
