"""4-bit weights: linear layers that keep them packed and unpack them in every product.

NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3) through bitsandbytes, or the
blocks of a GGUF file as they stand there. Embedding, head and norms stay as they are.
Axes: I in_features, O out_features; `...` any leading axes.
"""

import copy
import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loralab.errors import ModelError
from loralab.models.catalog import MODELS
from loralab.models.gguf_blocks import GGUFBlocks, linear_tensors

NF4_BLOCK = 64  # weights that share a scale in NF4
UNQUANTIZED_HEADS = ("lm_head", "classifier", "score", "head", "qa_outputs")
# it warns of a faster kernel from a hub, which is not asked for; transformers may import it first
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class PackedWeight(Protocol):
    """A weight in few bits; it never changes."""

    data: Tensor

    def around(self, data: Tensor) -> "PackedWeight":
        """Return the same scales around these bytes."""

    def dequantize(self) -> Tensor:
        """Return the weight, (O, I)."""

    def nbytes(self) -> int:
        """Return the bytes that it takes, scales included."""

    def to(self, device: torch.device) -> "PackedWeight":
        """Return it on another device."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept packed.

    Nothing of the unpacked weight outlives a product: the backward pass unpacks it again. The bytes
    are `weight` and nowhere else, so that who splits or moves parameters has all of them.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.compute_dtype = dtype
        self._hold(packed)
        own = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", own)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def packed(self) -> PackedWeight:
        """Return the weight as it is kept."""
        return self._scales.around(self.weight.data)

    def dequantize(self) -> Tensor:
        """Return the weight, (O, I), in fp32."""
        return self.unpacked().float()

    def unpacked(self) -> Tensor:
        """Return the weight, (O, I), in the dtype that it had before it was packed; fp32 of GGUF blocks."""
        return self.packed.dequantize()

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that are kept for each weight, scales included."""
        return 8 * self.packed.nbytes() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        """Return sizes, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.bits_per_weight:.3f} bits"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move, but never cast: the bytes are not numbers."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).device
        self._hold(self.packed.to(device))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        return self

    def _hold(self, packed: PackedWeight) -> None:
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        self._scales = packed.around(packed.data.new_empty(0))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.unpacked().to(dy.dtype), None


class NF4:
    """A weight in 4-bit NormalFloat, blocks of 64, scales in 8 bits (double quantisation)."""

    def __init__(self, weight: Tensor, *, double: bool = True) -> None:
        self.data, self.state = bitsandbytes().quantize_4bit(
            weight.detach().contiguous(), blocksize=NF4_BLOCK, compress_statistics=double, quant_type="nf4"
        )

    def dequantize(self) -> Tensor:
        """Return the weight, (O, I), in the dtype that it had."""
        return unpack(self.data, self.state)

    def scales(self) -> Tensor:
        """Return the scale of each block in fp32, unpacked."""
        return unpack_scales(self.state)

    def nbytes(self) -> int:
        """Return packed weights and scales; the two tables of levels are shared by all layers."""
        parts = [self.data, self.state.absmax]
        if self.state.nested:
            parts += [self.state.state2.absmax, self.state.offset]
        return sum(part.numel() * part.element_size() for part in parts)

    def around(self, data: Tensor) -> "NF4":
        """Return the same scales around these bytes."""
        other = copy.copy(self)
        other.data = data
        return other

    def to(self, device: torch.device) -> "NF4":
        """Return it on another device."""
        other = self.around(self.data.to(device))
        other.state = copy.copy(self.state)
        other.state.state2 = copy.copy(self.state.state2)
        other.state.to(device)  # changes them in place
        return other

    def __deepcopy__(self, known: dict[int, Any]) -> "NF4":
        return self.around(copy.deepcopy(self.data, known))


def unpack(data: Tensor, state: Any) -> Tensor:
    """Return a weight that bitsandbytes packed in 4 bits, in the dtype that it had.

    With AVX-512 bitsandbytes takes every row to begin with a scale of its own, which is wrong where
    rows are no whole blocks; of one long row it reads the right scales.
    """
    shape = state.shape
    if shape[-1] % state.blocksize:
        state = copy.copy(state)
        state.shape = torch.Size([1, math.prod(shape)])
    found: Tensor = bitsandbytes().dequantize_4bit(data, state)
    return found.view(shape)


def unpack_scales(state: Any) -> Tensor:
    """Return the scale of each block in fp32."""
    if not state.nested:
        return state.absmax.float()
    found: Tensor = bitsandbytes().dequantize_blockwise(state.absmax, state.state2)
    return (found + state.offset).float()


def quantize(model: Any, how: str, name: str) -> None:
    """Replace the linear layers of a model, but for its head, in place.

    Args:
        how: "nf4", or "gguf" for the blocks of the file that the model came from.
        name: what the model was loaded by.

    Raises:
        ModelError: the extra is not installed, or the model came from no GGUF file.
    """
    if how == "gguf":
        _from_file(model, name)
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights need bitsandbytes: pip install 'loralab[quant]'", code="not_installed", field="bitsandbytes"
        )
    for path, layer in linear_layers(model):
        shape = (layer.out_features, layer.in_features)
        new = QuantizedLinear(NF4(layer.weight), layer.bias, shape, layer.weight.dtype)
        _put(model, path, new)


def dequantize(model: nn.Module) -> int:
    """Replace packed layers by plain ones in their compute dtype; returns how many there were."""
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for path, layer in packed:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.unpacked().to(layer.compute_dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        _put(model, path, plain)
    return len(packed)


def retained_share(before: Tensor, after: Tensor, *, double: bool = True) -> float:
    """Return the part of an update that survives quantisation: <Q(W + D) - Q(W), D> / |D|^2.

    Args:
        before: W, (O, I), as the quantised base has it.
        after: W + D.
    """
    update = (after - before).double()
    norm = float(update.square().sum())
    if not norm:
        return 1.0
    kept = NF4(after, double=double).dequantize() - NF4(before, double=double).dequantize()
    return float((kept.double() * update).sum()) / norm


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that are packed: all linear ones, but for the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head and path.split(".")[0] not in UNQUANTIZED_HEADS:
            yield path, layer


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file behind a short name or a path."""
    path = MODELS[name].locate() if name in MODELS else Path(name).expanduser()
    return path if path is not None and path.suffix == ".gguf" and path.is_file() else None


@functools.cache
def bitsandbytes() -> Any:
    """Return bitsandbytes' functions."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _from_file(model: Any, name: str) -> None:
    file = gguf_file(name)
    if file is None:
        raise ModelError(
            f"--quantize gguf needs a model that is a GGUF file, which {name} is not", code="not_gguf", field="quantize"
        )
    layers = dict(linear_layers(model))
    found = linear_tensors(file, model.config)
    for path in layers.keys() - found.keys():
        raise ModelError(f"{file.name} holds no quantised weight for {path}", code="missing_tensor", field=path)
    for path, layer in layers.items():
        blocks: GGUFBlocks = found[path].to(layer.weight.device)
        shape = (layer.out_features, layer.in_features)
        want = layer.weight.detach().float()
        if not torch.allclose(blocks.dequantize().view(shape), want, rtol=2**-7, atol=1e-6):
            raise ModelError(
                f"{file.name}: the blocks of {path} do not give the model's weight", code="damaged", field=path
            )
        _put(model, path, QuantizedLinear(blocks, layer.bias, shape, layer.weight.dtype))


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
