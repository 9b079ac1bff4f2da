"""LoRA as a method: which wrapper stands where, and peft's fields and back.

The equation itself: linear.py, and the same update in embedding.py, conv.py, multihead.py and
expert_lora.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import parts as fused
from loralab.adapters.bases import is_conv1d
from loralab.adapters.conv import ConvWithLoRA, is_convolution
from loralab.adapters.embedding import EmbeddingWithLoRA, TrainedRows
from loralab.adapters.expert_lora import ExpertsWithLoRA
from loralab.adapters.experts import adaptable_experts
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA, first_match
from loralab.adapters.multihead import MultiheadAttentionWithLoRA
from loralab.adapters.paths import ends_with
from loralab.adapters.peft_fields import refuse_unknown, selecting_fields, targeted
from loralab.adapters.shells import plain_paths
from loralab.adapters.targets import target_names
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterFileError, ConfigError, TargetError, format_value

STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
Actual = tuple[int, float]  # rank and factor of a saved update


def build(model: nn.Module, config: LoRA, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path."""
    plain = plain_paths(model)
    wrappers: dict[str, Wrapper] = {}
    experts = set(adaptable_experts(model).values())
    for path, names in selected_modules(model, config).items():
        if path in experts:
            module = model.get_submodule(path)
            own = {name: for_parameter(config, plain(path), name) for name in names}
            wrappers[path] = ExpertsWithLoRA(module, own, generator)
        else:
            wrappers[path] = _wrapped(model, path, names, config.for_module(plain(path)), generator)
    if config.token_rows:
        wrappers |= _token_rows(model, config, wrappers)
    return wrappers


def selected_modules(model: nn.Module, config: LoRA) -> dict[str, list[str]]:
    """Return the paths of the modules that are adapted, with the parts that are meant; none is the whole.

    Parts of experts are their parameters, all of them where the whole is meant.
    """
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    experts = list(adaptable_experts(model))
    others = [*fused.part_names(model), *_further(model), *experts]
    implied = heads if config.dora else [*heads, *experts]
    return fused.by_module(model, target_names(model, config, others, implied=implied))


def for_parameter(config: LoRA, path: str, name: str) -> LoRA:
    """Return the configuration with the rank and the alpha of one parameter of experts.

    The patterns may mean the parameter, as peft's do, or the module that has it.
    """
    whole = config.for_module(path)
    return replace(
        whole,
        rank=first_match(f"{path}.{name}", config.rank_pattern, whole.rank),
        alpha=first_match(f"{path}.{name}", config.alpha_pattern, whole.alpha),
    )


def fields(config: LoRA, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: peft's LORA."""
    rows = [name for name, module in modules.items() if isinstance(module, TrainedRows)]
    updates = {name: module for name, module in modules.items() if name not in rows}
    found = lora_fields(plain(config), updates, paths)
    if rows:
        found["trainable_token_indices"] = {rows[0].rpartition(".")[2]: list(config.token_rows)}
    return found


def lora_fields(
    config: LoRA, modules: Mapping[str, Any], paths: Iterable[str], factor: float | None = None
) -> dict[str, Any]:
    """Return peft's fields for some updates; ranks and factors that differ go into its patterns.

    Args:
        factor: of every module; None is each module's own `scaling`.
    """
    paths = list(paths)
    experts = {name: module for name, module in modules.items() if isinstance(module, ExpertsWithLoRA)}
    layers_only = {name: module for name, module in modules.items() if name not in experts}
    actual = {n: (_rank(m), m.scaling if factor is None else factor) for n, m in layers_only.items()}
    actual |= {f"{path}.{name}": own for path, m in experts.items() for name, own in m.ranks().items()}
    flat = _with_patterns(config, actual)
    targets, layers = selecting_fields(list(layers_only), paths) if layers_only else ([], None)
    return {
        "peft_type": "LORA",
        "r": flat.rank,
        "lora_alpha": _whole(flat.alpha),
        "lora_dropout": flat.dropout,
        "target_modules": targets,
        "exclude_modules": None,
        **({"target_parameters": _target_parameters(experts, paths)} if experts else {}),
        "layers_to_transform": layers,
        "layers_pattern": None,
        "use_rslora": flat.scaling == "alpha/sqrt(r)",
        "use_dora": flat.dora,
        "bias": "none",
        "fan_in_fan_out": not experts and all(is_conv1d(module.original) for module in modules.values()),
        "init_lora_weights": True,
        "rank_pattern": dict(flat.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in flat.alpha_pattern.items()},
        "modules_to_save": list(flat.modules_to_save) or None,
    }


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoRA, Mapping[str, Tensor]]:
    """Return the configuration that peft's fields describe.

    Raises:
        AdapterFileError: an option whose meaning would be lost.
    """
    init = fields.get("init_lora_weights", True)
    if init not in STARTS_THAT_KEEP_THE_BASE:
        raise AdapterFileError(
            f"init_lora_weights {init!r} changes the base weights at the start, so these tensors "
            "do not fit the original base; save it again with peft's "
            "`path_initial_model_for_weight_conversion`",
            code="changed_base",
            field="init_lora_weights",
        )
    if fields.get("bias", "none") != "none":
        raise AdapterFileError(
            f"bias {fields['bias']!r} is not supported, only 'none'", code="unsupported_option", field="bias"
        )
    refuse_unknown(
        fields,
        {
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "init_lora_weights",
            "bias",
            "trainable_token_indices",
            "target_parameters",
        },
    )
    config = LoRA(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        scaling="alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r",
        dora=bool(fields.get("use_dora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        token_rows=_indices(fields.get("trainable_token_indices")),
        **_targeted(fields),
    )
    return config, _as_peft_computes(fields, tensors)


def rate_ratio(config: LoRA, name: str) -> float:
    """Return LoRA+'s ratio (arXiv:2402.12354): every B learns `lora_plus` times as fast as the rest."""
    return config.lora_plus if name.endswith(("lora_B", "out_B", "lora_embedding_B")) else 1.0


def plain(config: LoRA) -> LoRA:
    """Return the plain LoRA that a trained adapter amounts to, as peft can express it.

    PiSSA's B A - B0 A0 is an update of twice the rank; no scaling is alpha = r. In both cases
    every module keeps its factor.
    """
    width = 2 if config.init == "pissa" else 1
    ranks = {pattern: width * rank for pattern, rank in config.rank_pattern.items()}
    if config.scaling == "none":
        return replace(
            config,
            init="kaiming",
            scaling="alpha/r",
            rank=width * config.rank,
            alpha=width * config.rank,
            rank_pattern=ranks,
            alpha_pattern=dict(ranks),
        )
    stretch = width if config.scaling == "alpha/r" else math.sqrt(width)
    return replace(
        config,
        init="kaiming",
        rank=width * config.rank,
        alpha=stretch * config.alpha,
        rank_pattern=ranks,
        alpha_pattern={pattern: stretch * alpha for pattern, alpha in config.alpha_pattern.items()},
    )


def _as_peft_computes(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Allow for peft (0.21 and before), which adds the update of nn.MultiheadAttention's out_proj twice.

    In training too, so a file of its making means twice what it says (docs/findings.md).
    """
    if "peft_version" not in fields:
        return tensors
    twice = (".base_layer.out_proj.lora_B.weight",)
    return {key: 2 * t if key.endswith(twice) else t for key, t in tensors.items()}


def _wrapped(model: nn.Module, path: str, names: list[str], config: LoRA, generator: torch.Generator | None) -> Wrapper:
    module = model.get_submodule(path)
    rows = fused.rows_of(model, module, path) if names else {}
    if isinstance(module, nn.MultiheadAttention):
        inner = [rows[name] for name in names if name != "out_proj"]
        out = not names or "out_proj" in names
        return MultiheadAttentionWithLoRA(module, config, generator, inner, out)
    if isinstance(module, nn.Embedding):
        return EmbeddingWithLoRA(module, config, generator)
    if is_convolution(module):
        return ConvWithLoRA(module, config, generator)
    return LinearWithLoRA(module, config, generator, [rows[name] for name in names])


def _target_parameters(experts: Mapping[str, ExpertsWithLoRA], paths: Iterable[str]) -> list[str]:
    """Return names that select these parameters alone: ends, or whole paths where ends mean others, too."""
    chosen = {f"{path}.{name}": path.rpartition(".")[2] for path, module in experts.items() for name in module.ranks()}
    ends = sorted({f"{leaf}.{name.rpartition('.')[2]}" for name, leaf in chosen.items()})
    modules = [path for path in paths if path.rpartition(".")[2] in chosen.values()]
    meant = {
        f"{path}.{end.rpartition('.')[2]}" for path in modules for end in ends if ends_with(path, end.split(".")[0])
    }
    return ends if meant == chosen.keys() else list(chosen)


def _targeted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Method`; experts' parameters are targets among others here."""
    found, given = targeted(fields), fields.get("target_parameters") or ()
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) and name for name in given):
        raise AdapterFileError(
            f"target_parameters must be a list of names, got {format_value(given)}",
            code="invalid_value",
            field="target_parameters",
        )
    parameters = tuple(given)
    if not parameters:
        return found
    targets = found["target_modules"] or ()
    if isinstance(targets, str):
        ends = "|".join(map(re.escape, parameters))
        return {**found, "target_modules": rf"({targets})|(.*\.)?({ends})"}
    return {**found, "target_modules": (*targets, *parameters)}


def _further(model: nn.Module) -> list[str]:
    """Return the paths of what is adapted only where it is named."""
    kinds = (nn.Embedding, nn.MultiheadAttention)
    named = [(name, module) for name, module in model.named_modules() if name]
    return [name for name, m in named if isinstance(m, kinds) or is_convolution(m)]


def _token_rows(model: Any, config: LoRA, wrappers: Mapping[str, Wrapper]) -> dict[str, Wrapper]:
    """Return the input embedding's trained rows, and those of a head that shares its weight."""
    embedding, head = model.get_input_embeddings(), None
    if callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if names[embedding] in wrappers:
        raise TargetError(
            f"{names[embedding]!r} is both a target and trained by token_rows",
            code="target_and_token_rows",
            field="token_rows",
        )
    rows = TrainedRows(embedding, config.token_rows)
    found: dict[str, Wrapper] = {names[embedding]: rows}
    if head is not None and head.weight is embedding.weight:
        if names[head] in wrappers:
            raise TargetError(
                f"{names[head]!r} shares its weight with the embedding whose rows are trained; "
                "leave it out of target_modules",
                code="tied_head",
                field="token_rows",
            )
        found[names[head]] = TrainedRows(head, config.token_rows, shared=rows)
    return found


def _with_patterns(config: LoRA, actual: Mapping[str, Actual]) -> LoRA:
    """Return `config` with patterns that give every module its actual rank and factor."""
    odd = {name: own for name, own in actual.items() if not _gives(config, name, own)}
    if not odd:
        return config
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for name, (rank, factor) in odd.items():
        key = _key(name, actual)
        ranks[key] = rank
        alphas[key] = factor * (rank if config.scaling == "alpha/r" else math.sqrt(rank))
    # the longest first: the first that matches decides
    ordered = sorted(ranks, key=len, reverse=True)
    found = replace(
        config,
        rank_pattern={key: ranks[key] for key in ordered},
        alpha_pattern=dict(sorted(alphas.items(), key=lambda item: -len(item[0]))),
    )
    wrong = [name for name, own in actual.items() if not _gives(found, name, own)]
    if wrong:
        raise ConfigError(
            f"peft's patterns cannot tell the rank of {wrong[0]!r} from another's",
            code="ambiguous_pattern",
            field="rank_pattern",
        )
    return found


def _gives(config: LoRA, name: str, own: Actual) -> bool:
    here = config.for_module(name)
    return here.rank == own[0] and math.isclose(here.factor, own[1], rel_tol=1e-12)


def _key(name: str, actual: Mapping[str, Actual]) -> str:
    """Return the last name in the path, if all modules of that name are alike; else the whole path."""
    end = name.rpartition(".")[2]
    alike = {own for other, own in actual.items() if other.rpartition(".")[2] == end}
    return re.escape(end) if len(alike) == 1 else re.escape(name)


def _rank(module: Any) -> int:
    first = next(iter(module.tensors().values()))
    return int(first.shape[0])


def _indices(given: Any) -> tuple[int, ...]:
    if isinstance(given, Mapping):
        if len(given) > 1:
            raise AdapterFileError(
                f"trainable_token_indices of several embeddings is not supported: {list(given)}",
                code="unsupported_option",
                field="trainable_token_indices",
            )
        given = next(iter(given.values()), ())
    return tuple(given or ())


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
