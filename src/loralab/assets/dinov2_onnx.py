"""Converts the DINOv2 backbone inside an ONNX graph to a folder that transformers reads.

An exporter keeps the names of biases and norms, and folds the weight of every linear layer into
a nameless constant, transposed: such a weight is named by the node that multiplies with it. The
positions are two nameless constants, told by their shape: one of the class token, one of the
patches. Whatever is not of the backbone is left aside.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from loralab import atomic
from loralab.errors import ModelError
from loralab.models.pictures import IMAGENET_MEAN, IMAGENET_STD, Pictures

PREFIX = "backbone."
HEAD_WIDTH = 64  # of one attention head, in every DINOv2
DEFAULT_SIZE = 112  # pixels: 64 patches instead of the 1,369 of the pre-training


def write_folder(file: Path, folder: Path) -> None:
    """Write the backbone of an ONNX file as a new model folder.

    Raises:
        ModelError: the graph holds no DINOv2 backbone.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file, load_external_data=False).graph  # no other file is read
    # copies: arrays of onnx may stand on memory that is read-only
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    tensors = _tensors(file, graph.node, held)
    with atomic.new_folder(folder) as place:
        atomic.write_file(place / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        atomic.write_file(place / "config.json", json.dumps(_config(tensors), indent=2))
        Pictures(size=DEFAULT_SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD).save_pretrained(place)


def _tensors(file: Path, nodes: Any, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors under the names of Dinov2Model."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in held.items() if name.startswith(PREFIX)}
    for node in nodes:
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        constants = [name for name in node.input if name in held]
        if layer and constants:
            weight = held[constants[0]].T.contiguous()
            found[layer[1].replace("/", ".") + ".weight"] = weight
    first = found.get("embeddings.cls_token")
    if first is None or not any(name.endswith("query.weight") for name in found):
        raise ModelError(
            f"{file.name} holds no DINOv2 backbone under the name {PREFIX!r}", code="no_backbone", field="model"
        )
    found["embeddings.position_embeddings"] = _positions(file, held, first.shape[-1])
    found["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])  # of the pre-training alone
    return found


def _positions(file: Path, held: dict[str, Tensor], width: int) -> Tensor:
    """Return (1, 1 + patches, width): the class token's place first."""
    nameless = [
        tensor
        for name, tensor in held.items()
        if not name.startswith(PREFIX) and tensor.ndim == 3 and tensor.shape[-1] == width
    ]
    if len(nameless) != 2:
        raise ModelError(
            f"{file.name}: expected the positions as two constants (1, n, {width}), "
            f"found {[tuple(tensor.shape) for tensor in nameless]}",
            code="wrong_shape",
            field="model",
        )
    return torch.cat(sorted(nameless, key=lambda tensor: tensor.shape[1]), dim=1)


def _config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the config.json of these tensors."""
    _, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    _, places, width = tensors["embeddings.position_embeddings"].shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    inner = len(tensors["encoder.layer.0.mlp.fc1.bias"])
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": inner // width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(places - 1),
    }
