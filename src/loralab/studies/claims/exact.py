"""Measures of claims in which nothing is drawn: counts, starts, codes and gradients; one run says all.

Their options stand in the claim's file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.models.quantize import NF4, QuantizedLinear, linear_layers
from loralab.studies.fields import configured
from loralab.studies.measures.carried import base_for
from loralab.studies.measures.step_zero import start_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell
from loralab.training.loss import summed_loss
from loralab.values import check_choice


def start(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Attach the arm's method to the base in fp32, and compare the two before any step."""
    numbers, changes = start_of(trial)
    return trial.record(numbers=numbers, items={"start": changes})


def count(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Count what a method trains on an architecture without numbers.

    {"architecture": {"model_type", ...fields of its configuration}, "kind": "AutoModelForCausalLM" or
    another class of transformers, "published": a whole number}; `method` are the fields of the method.
    """
    import transformers

    options = trial.arm.options
    sizes = dict(options["architecture"])
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    kind = getattr(transformers, str(options.get("kind", "AutoModelForCausalLM")))
    with torch.device("meta"):
        model = kind.from_config(config)
    trained = attach(model, configured(options["method"])[0]).num_parameters
    return trial.record(numbers={"trained": trained, "missed": abs(trained - int(options["published"]))})


def nf4(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Compare 4-bit weights with their description, as a share of what is described.

    {"levels": the 16 of NF4} or {"bits": of a weight of the study's model, "double": whether its scales
    are quantised too}.
    """
    options = trial.arm.options
    if "levels" in options:
        import bitsandbytes.functional as bnb

        levels = torch.tensor(options["levels"], dtype=torch.float64)
        found = float((bnb.get_4bit_type("nf4", device="cpu").double() - levels).abs().max())
        return trial.record(numbers={"relative": found})
    base, _ = base_for(trial.setup, "fp32")
    held = stored = 0.0
    for _, layer in linear_layers(base.model):
        packed = NF4(layer.weight, double=bool(options["double"]))
        bits = QuantizedLinear(packed, None, (layer.out_features, layer.in_features), torch.float32).bits_per_weight
        held, stored = held + layer.weight.numel(), stored + bits * layer.weight.numel()
    bits = stored / held
    return trial.record(numbers={"bits": bits, "relative": abs(bits / float(options["bits"]) - 1)})


def gradients(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Compare gradients that are written by hand with those of autograd: |g - g'| / |g'|, the worst tensor.

    {"of": "loss" or "lora", and sizes: "tokens", "width", "outputs" (a vocabulary), "rank"}.
    """
    options = trial.arm.options
    check_choice("of", str(options["of"]), tuple(GRADIENTS))
    pairs = GRADIENTS[str(options["of"])](options)
    worst = max(float((own - plain).norm() / plain.norm().clamp_min(1e-30)) for own, plain in pairs)
    return trial.record(numbers={"relative": worst})


Pairs = list[tuple[Tensor, Tensor]]


def _of_loss(sizes: Mapping[str, Any]) -> Pairs:
    """Return loss and gradient of the chunked cross-entropy, each beside that of all logits at once."""
    draw = torch.Generator().manual_seed(0)
    tokens, width, outputs = (int(sizes[name]) for name in ("tokens", "width", "outputs"))
    head = nn.Linear(width, outputs, bias=False).requires_grad_(requires_grad=False)
    head.weight.copy_(torch.randn(outputs, width, generator=draw) / width**0.5)
    hidden = torch.randn(tokens, width, generator=draw).requires_grad_()
    labels = torch.randint(outputs, (tokens,), generator=draw)
    own = summed_loss(head, hidden, labels)
    plain = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    return [(own.detach(), plain.detach()), *zip(_gradients(own, hidden), _gradients(plain, hidden), strict=True)]


def _of_lora(sizes: Mapping[str, Any]) -> Pairs:
    """Return the gradients of A, B and the input of an adapted layer, each beside that of the formula."""
    draw = torch.Generator().manual_seed(0)
    tokens, width, outputs = (int(sizes[name]) for name in ("tokens", "width", "outputs"))
    model: Any = nn.Sequential()
    model.add_module("layer", nn.Linear(width, outputs))
    config = LoRA(rank=int(sizes["rank"]), target_modules="layer", init="b_kaiming")  # B not zero: all gradients are
    adapter = attach(model, config, generator=draw)
    layer: Any = next(iter(adapter.modules.values()))
    x = torch.randn(tokens, width, generator=draw).requires_grad_()
    weigh = torch.randn(tokens, outputs, generator=draw)
    A, B = layer.lora_A, layer.lora_B
    own = (model.layer(x) * weigh).sum()
    formula = F.linear(x, layer.base.weight, layer.base.bias) + layer.scaling * (x @ A.T @ B.T)
    plain = (formula * weigh).sum()
    return list(zip(_gradients(own, x, A, B), _gradients(plain, x, A, B), strict=True))


def _gradients(value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, tensors)


GRADIENTS: dict[str, Callable[[Mapping[str, Any]], Pairs]] = {"loss": _of_loss, "lora": _of_lora}
