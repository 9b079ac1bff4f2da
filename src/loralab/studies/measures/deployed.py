"""Ways to deploy a trained adapter, timed and scored side by side.

One trial holds the base, the adapter merged, beside it, and many adapters in one batch. Three more
hold the merged model in int8, in NF4, and with half of its weights at zero, each with the dense
merged model beside it.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.prune import L1Unstructured

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import is_conv1d, shared_copy
from loralab.errors import LoralabError, ModelError
from loralab.models.device import device_here
from loralab.models.load import Base
from loralab.models.quantize import QuantizedLinear, linear_layers, quantize
from loralab.studies.measures.carried import adapter_folder, base_for, copy_of, put_on
from loralab.studies.measures.decoding import Variant, inputs_for, interleaved, working_bytes, writes
from loralab.studies.measures.layers import put_weight
from loralab.studies.measures.mixed_batch import Banked, Looped, as_large
from loralab.studies.study import Record, Trial
from loralab.studies.timing import in_turns, timed
from loralab.studies.trained import Tell, items_of, score
from loralab.tasks.catalog import Task
from loralab.tasks.forward import call
from loralab.training.memory import available_bytes

MEASURE_ADAPTERS = "loralab.studies.measures.deployed:measure_adapters"
MEASURE_SMALLER = "loralab.studies.measures.deployed:measure_smaller"
BASE, MERGED, UNMERGED, DENSE = "base", "merged", "unmerged", "dense"
SEVERAL, LOOPED = "adapters", "looped"  # in the names of variants that hold several
SHARE = 0.5  # of the weights of each layer that are set to zero
ROOM = 0.8  # of the free memory that a further variant may take
OF_A_ROW = 16  # bytes that an int8 layer keeps for a row: a double and a 64-bit zero point
PRODUCTS = 20  # of one layer, dense and sparse


def measure_adapters(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time the base, merged, unmerged and several adapters: {"adapters", "looped", "batches", ...}."""
    place, options = adapter_folder(trial, folder, tell), trial.arm.options
    base, task = base_for(trial.setup)
    beside, own = (put_on(copy_of(base), place) for _ in range(2))
    merged = Variant(name=MERGED, model=own.merge_and_detach().eval())
    unmerged = Variant(name=UNMERGED, model=beside.model.eval())
    variants, refused = [Variant(name=BASE, model=base.model), merged, unmerged], []
    differences = {}
    for count, loops in [(n, False) for n in options["adapters"]] + [(n, True) for n in options["looped"]]:
        name = named(count, loops)
        try:
            variant, differences[name] = several(base, unmerged, beside, count, loops)
            variants.append(variant)
        except LoralabError as error:
            refused.append({"variant": name, "reason": str(error)})
    numbers = {"adapter_bytes": float(_bytes_of(beside)), "switch_seconds": switch_seconds(beside)}
    numbers |= {"routed_difference": max(differences.values())} if differences else {}
    record = _record(trial, base, task, variants, (BASE, MERGED, UNMERGED))
    return replace(record, numbers=numbers, tables={**record.tables, "refused": refused})


def measure_smaller(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time the merged model made smaller in the way that the options name, and as it is."""
    place, how = adapter_folder(trial, folder, tell), str(trial.arm.options["how"])
    base, task = base_for(trial.setup, "fp32" if how == "int8" else "")
    base = replace(base, model=put_on(base, place).merge_and_detach().eval())
    other = Variant(name=trial.arm.name, model=SMALLER[how](base))
    record = _record(trial, base, task, [Variant(name=DENSE, model=base.model), other], (DENSE, other.name))
    ratio = sparse_ratio(other.model) if how == "pruned" else None
    return record if ratio is None else replace(record, numbers={"sparse_ratio": ratio})


def _record(trial: Trial, base: Base, task: Task, variants: Sequence[Variant], scored: Sequence[str]) -> Record:
    """Time all variants beside the first, weigh them, and score those that can be."""
    options = trial.arm.options
    seconds, most = float(options["seconds"]), int(options["trials"])
    times = interleaved(base, variants, options["batches"], seconds=seconds, most=most)
    largest = max(batch for _, batch in times)
    latency: list[dict[str, Any]] = []
    for (variant, batch), own in times.items():
        prompt, token = (list(seconds) for seconds in zip(*own, strict=True))
        row = {"variant": variant.name, "batch": batch, "control": variants[0].name}
        latency.append({**row, "seconds": token, "prompt": prompt})
    weights = [
        {"variant": v.name, "bytes": weight_bytes(v.model), "working": working_bytes(base, v, largest)}
        for v in variants
    ]
    scores = {v.name: score(base, task, model=v.model) for v in variants if v.name in scored}
    metric = trial.setup.metric or scores[scored[0]].main
    return trial.record(
        items={name: items_of(own, metric) for name, own in scores.items()},
        tables={"latency": latency, "weights": weights},
        texts={"metric": metric, "unit": "token" if writes(base) else "pass"},
    )


def _bytes_of(adapter: Adapter) -> int:
    return sum(p.numel() * p.element_size() for p in adapter.parameters())


def named(count: int, loops: bool) -> str:
    """Return the name of a variant of several adapters."""
    return f"{count} {SEVERAL}, {LOOPED}" if loops else f"{count} {SEVERAL}"


def several(base: Base, unmerged: Variant, adapter: Adapter, count: int, loops: bool) -> tuple[Variant, float]:
    """Return a variant of several adapters, and how far it is from the trained one where all rows take it.

    The difference is the largest of the logits, over the largest logit.

    Raises:
        ModelError: they do not fit into memory.
    """
    if count * _bytes_of(adapter) > ROOM * available_bytes(device_here()):
        text = f"{count} adapters of {_bytes_of(adapter) / 1e6:.0f} MB do not fit into memory"
        raise ModelError(text, code="out_of_memory", field="adapters")
    model = shared_copy(base.model)
    adapters = as_large(adapter, base.model, count)
    mixed = (Looped if loops else Banked)(model, adapters)
    # their numbers are part of what this variant weighs
    model.add_module("adapters", nn.ParameterList(p for own in adapters for p in own.parameters()))
    inputs = inputs_for(base, 2)
    with torch.no_grad():
        mixed.route([0, 0])
        want, got = call(unmerged.model, inputs).float(), call(model, inputs).float()
    difference = float((want - got).abs().max() / want.abs().max())

    def ready(batch: int) -> None:
        mixed.route(sorted(number % count for number in range(batch)))

    return Variant(name=named(count, loops), model=model, ready=ready), difference


def switch_seconds(adapter: Adapter) -> float:
    """Return the seconds to merge an adapter and to take it out again, the quicker of two."""
    return min(timed(adapter.merge)[1] + timed(adapter.unmerge)[1] for _ in range(2))


def in_int8(base: Base) -> Any:
    """Hold weights in int8, a scale a row; inputs are rounded to int8 as they come, a scale a tensor.

    This is torch's dynamic quantisation, which it still ships and calls deprecated, in warnings
    that are not the user's to act on.

    Raises:
        ModelError: this torch has none, or the model is on a GPU.
    """
    if next(base.model.parameters()).is_cuda:
        raise ModelError("torch's dynamic int8 layers run on the processor only", code="no_kernel", field="values")
    layers = _layers(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

            model = shared_copy(base.model)
            wanted = dict.fromkeys((path for path, _ in layers), per_channel_dynamic_qconfig)
            return quantize_dynamic(model, wanted, dtype=torch.qint8, inplace=True)
        except (ImportError, AttributeError, RuntimeError) as error:
            text = f"this torch has no dynamic int8 layers: {error}"
            raise ModelError(text, code="no_kernel", field="values") from None


def in_nf4(base: Base) -> Any:
    """Hold linear layers in 4 bits, unpacked for every product."""
    _layers(base)
    model = shared_copy(base.model)
    quantize(model, "nf4", base.name)
    return model


def pruned(base: Base) -> Any:
    """Set the smaller half of each linear layer's weights to zero; they are dense matrices still."""
    model, half = shared_copy(base.model), L1Unstructured(SHARE)
    for layer in _inner(model):
        put_weight(layer, half.prune(layer.weight.detach()))
    return model


SMALLER = {"int8": in_int8, "nf4": in_nf4, "pruned": pruned}


def _layers(base: Base) -> list[tuple[str, nn.Linear]]:
    found = list(linear_layers(base.model))
    if not found:
        text = f"{type(base.model).__name__} has no nn.Linear layers beside its head; nothing to quantise"
        raise ModelError(text, code="no_linear_layers", field="model")
    return found


@torch.no_grad()
def sparse_ratio(model: Any) -> float | None:
    """Return the time of the largest layer's product as a sparse matrix over that as a dense one, in fp32.

    None where torch has no sparse product here.
    """
    layers = (m for m in _inner(model) if isinstance(m, nn.Linear))
    weight = max((m.weight for m in layers), key=lambda w: w.numel(), default=None)
    if weight is None:
        return None
    dense = weight.detach().float()
    x = torch.randn(dense.shape[1], 1, generator=torch.Generator().manual_seed(0)).to(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices a beta
        try:
            matrices = {"dense": dense, "sparse": dense.to_sparse_csr()}
            products = {name: partial(torch.matmul, matrix, x) for name, matrix in matrices.items()}
            times = in_turns(
                list(products), [1], lambda way, _: timed(products[way])[1], seconds=math.inf, most=PRODUCTS
            )
        except RuntimeError:
            return None
    return float(np.median(times["sparse", 1]) / np.median(times["dense", 1]))


def _inner(model: Any) -> list[Any]:
    """Return the linear layers but for a language model's head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [m for m in model.modules() if (isinstance(m, nn.Linear) or is_conv1d(m)) and m is not head]


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights that a model holds, each storage once, packed ones as they are."""
    total, packed = 0, set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.packed.nbytes()
            packed.add(module.weight.untyped_storage().data_ptr())
        elif "_packed_params" in module._modules:  # int8: a byte a weight, scale and zero a row
            total += module.out_features * (module.in_features + OF_A_ROW)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return total + sum(size for at, size in storages.items() if at not in packed)
