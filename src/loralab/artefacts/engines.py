"""Check whether other engines can use an adapter, before anything is written.

Sources: vLLM 0.32 (`lora/peft_helper.py`, `lora/lora_model.py`), llama.cpp (`llama-adapter.cpp`,
`convert_lora_to_gguf.py`), peft 0.21.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from loralab.adapters import folder
from loralab.adapters.adapter import Adapter
from loralab.adapters.conv import ConvWithLoRA
from loralab.adapters.expert_formats import ROLES
from loralab.adapters.experts import adaptable_experts
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.multihead import MultiheadAttentionWithLoRA
from loralab.adapters.per_expert import stacked_keys
from loralab.adapters.registry import spec_of, spec_of_file
from loralab.artefacts.gguf_adapter import FAMILIES
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.updates import ENDINGS, Update, is_uniform, updates
from loralab.errors import ConfigError, ModelError, join_limited, nearest
from loralab.models import load as models
from loralab.models.gguf_blocks import LAYERS
from loralab.models.kinds import CAUSAL, IMAGE_TEXT, SERVED

EXPORT, MERGE, NONE, UNSERVED = "export", "merge", "none", "unserved"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be, but for 1
VLLM_DEFAULT_RANK = 16  # of vLLM, where nothing is said
# language models of vLLM 0.32 that take no adapters, and those that take them on the embedding
WITHOUT_LORA = ("GPT2LMHeadModel", "GPTJForCausalLM", "BloomForCausalLM", "FalconForCausalLM", "StableLmForCausalLM")
# models of whose experts it reads all updates at once, as peft writes them, and one by one of the others
WITH_STACKED_EXPERTS = (
    "GptOssForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "NemotronHForCausalLM",
)
WITH_EMBEDDING_LORA = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen3ForCausalLM",
    "GraniteForCausalLM",
)
OUT_B = "base_layer.out_proj.lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class Incompatibility:
    """Property of an adapter that an engine would refuse or leave out.

    `remedy` is "export" (`loralab export` writes what it takes), "merge" (a merged model has
    it), or "none".
    """

    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that stands between an adapter and an engine; `notes` are not obstacles."""

    target: str
    obstacles: tuple[Incompatibility, ...]
    notes: tuple[str, ...] = ()

    @property
    def as_it_is(self) -> bool:
        """Return whether nothing does."""
        return not self.obstacles

    @property
    def lasting(self) -> list[str]:
        """Return what an export cannot remove either."""
        return [one.what for one in self.obstacles if one.remedy != EXPORT]

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {**asdict(self), "as_it_is": self.as_it_is}


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """Facts about a base from its configuration alone; None is not known."""

    architecture: str | None = None
    tied: bool | None = None


def check(adapter: str | Path, *, target: str, model: Any = None) -> Verdict:
    """Check what an engine would refuse or ignore of an adapter; write nothing.

    Args:
        target: "vllm", "gguf" (llama.cpp) or "peft".
        model: the base, by name or live; None is the one that the adapter names, if it can be
            found.

    Raises:
        ConfigError: there is no such target.
        AdapterFileError: the folder cannot be read.
        ModelError: the base that was given does not exist.
    """
    if target not in ENGINES:
        hint = nearest(target, ENGINES)
        raise ConfigError(
            f"there is no check for {target!r}, only for {', '.join(ENGINES)}{hint}",
            code="unknown_target",
            field="target",
        )
    return _checked(folder.read(adapter), target, model)


def check_folder(stored: AdapterFolder, target: str, base_info: BaseInfo) -> Verdict:
    """Return the verdict on a folder that was read, for a base that is known."""
    return ENGINES[target](stored, base_info)


def require(adapter: str | Path, target: str, model: Any) -> AdapterFolder:
    """Return the folder, if `export` can write it for an engine.

    Raises:
        ConfigError: it cannot; says why, and the way out.
    """
    stored = folder.read(adapter)
    verdict = _checked(stored, target, model)
    if lasting := verdict.lasting:
        merged = any(one.remedy == MERGE for one in verdict.obstacles)
        blocked = any(one.remedy in (NONE, UNSERVED) for one in verdict.obstacles)
        way = "; `loralab merge` writes a model that has it" if merged and not blocked else ""
        raise ConfigError(
            f"{adapter} cannot be written for {target}: {join_limited(lasting)}{way}",
            code="not_exportable",
            field="target",
        )
    return stored


def read_base_info(model: Any) -> BaseInfo:
    """Return the facts about a base, a live one or one by name, without its weights.

    Raises:
        ModelError: it does not exist.
    """
    live = isinstance(model, nn.Module)
    config: Any = model.config if live else models.configuration(model)
    own = type(model).__name__ if live else (config.architectures or [None])[0]
    return BaseInfo(architecture=own, tied=bool(getattr(config, "tie_word_embeddings", False)))


def allowed_rank(rank: int) -> int:
    """Return the least --max-lora-rank of vLLM that holds a rank of at most 512."""
    return next(own for own in VLLM_RANKS if own >= rank)


def differs_in_peft(adapter: Adapter) -> list[str]:
    """Return the computations of an adapter that peft would do differently."""
    reasons = []
    for name, module in adapter.modules.items():
        if isinstance(module, ConvWithLoRA) and module.base.groups > 1:
            reasons.append(f"{name} is a convolution in groups, whose A peft does not group")
        if isinstance(module, ConvWithLoRA) and set(module.base.dilation) != {1}:
            reasons.append(f"{name} is a dilated convolution, whose dilation peft forgets")
        if isinstance(module, MultiheadAttentionWithLoRA) and bool(module.tensors()[OUT_B].any()):
            reasons.append(f"{name} updates out_proj, which peft would add twice")
    return reasons + _taken_for_experts(adapter)


def _taken_for_experts(adapter: Adapter) -> list[str]:
    """Return the layers that peft takes for experts: it goes by the names that these had in older checkpoints."""
    config = getattr(adapter.model, "config", None)
    renamed = get_checkpoint_conversion_mapping(getattr(config, "model_type", "")) is not None
    if not renamed or not adaptable_experts(adapter.model) or not spec_of(adapter.config).low_rank:
        return []
    linear = [name for name, module in adapter.modules.items() if isinstance(module, LinearWithLoRA)]
    taken = [name for name in linear if name.rpartition(".")[2] in ROLES]
    return [f"{join_limited(taken, 2)} would be read as updates of experts"] if taken else []


def _vllm(stored: AdapterFolder, base_info: BaseInfo) -> Verdict:
    found = [*_beyond_updates(stored, "vLLM"), *_vllm_base(stored, base_info)]
    own = updates(stored)
    rank = max((one.rank for one in own), default=0)
    if rank > VLLM_RANKS[-1]:
        found.append(Incompatibility(what=f"rank {rank}; vLLM's largest is {VLLM_RANKS[-1]}", remedy=MERGE))
    if own and _embedding(own) and base_info.architecture not in WITH_EMBEDDING_LORA:
        base = base_info.architecture or "a base that is not known here"
        found.append(Incompatibility(what=f"an embedding or head of {base} is updated", remedy=MERGE))
    found += _vllm_layout(stored, own, base_info)
    notes = []
    if VLLM_DEFAULT_RANK < rank <= VLLM_RANKS[-1]:
        notes.append(f"rank {rank}: start vLLM with --max-lora-rank {allowed_rank(rank)}")
    if not base_info.architecture:
        notes.append("the base was not found, so whether vLLM can adapt it was not looked at")
    return Verdict(target="vllm", obstacles=tuple(found), notes=tuple(notes))


def _vllm_layout(stored: AdapterFolder, own: list[Update], base_info: BaseInfo) -> list[Incompatibility]:
    """Return what is in the way of reading the tensors as they lie in the file."""
    stacked = bool(stacked_keys(stored))
    uneven = len({(one.rank, one.factor) for one in own}) > 1
    if stacked and base_info.architecture in WITH_STACKED_EXPERTS:
        what = "ranks or scales differ, and vLLM reads all experts of this model at once"
        return [Incompatibility(what=what, remedy=MERGE)] if uneven else []
    if stacked:
        what = "the experts' updates lie in one tensor, and vLLM reads those of this model one by one"
        return [Incompatibility(what=what, remedy=EXPORT)]
    return [Incompatibility(what=_uneven(stored), remedy=EXPORT)] if own and not is_uniform(stored) else []


def _vllm_base(stored: AdapterFolder, base_info: BaseInfo) -> list[Incompatibility]:
    found = []
    if how := _packed(stored, ("nf4", "gguf")):
        what = f"trained on a base packed as {how}, which vLLM's base is not"
        found.append(Incompatibility(what=what, remedy=MERGE))
    if base_info.architecture in WITHOUT_LORA:
        found.append(Incompatibility(what=f"vLLM adapts no {base_info.architecture}", remedy=MERGE))
    kind = stored.record.get("base", {}).get("kind") or CAUSAL
    if kind == IMAGE_TEXT:
        what = "the base reads pictures too, and what vLLM calls the layers of such models is not known here"
        found.append(Incompatibility(what=what, remedy=MERGE))
    elif kind != CAUSAL:
        what = f"the base is of kind {kind}, and no language model"
        found.append(Incompatibility(what=what, remedy=NONE if kind in SERVED else UNSERVED))
    return found


def _gguf(stored: AdapterFolder, base_info: BaseInfo) -> Verdict:
    found = _beyond_updates(stored, "llama.cpp")
    if how := _packed(stored, ("nf4",)):
        what = f"trained on a base packed as {how}, which llama.cpp's base is not"
        found.append(Incompatibility(what=what, remedy=MERGE))
    if base_info.architecture and base_info.architecture not in FAMILIES:
        what = f"the rows of {base_info.architecture} in a GGUF file are not known here"
        found.append(Incompatibility(what=f"{what}, only those of {join_limited(FAMILIES)}", remedy=MERGE))
    own = updates(stored)
    if stacked_keys(stored) or any(re.search(r"\.experts\.", key) for key in stored.tensors):
        found.append(Incompatibility(what="experts are updated", remedy=MERGE))
    if any(one.ending == ".lora_embedding_A" for one in own):
        found.append(Incompatibility(what="the embedding is updated", remedy=MERGE))
    if any(one.path == "lm_head" for one in own) and base_info.tied is not False:
        what = "the head is updated, which has no weight of its own in llama.cpp if it is tied"
        found.append(Incompatibility(what=what, remedy=MERGE))
    found += _strange(own)
    notes = ["llama.cpp reads a file: `loralab export --to gguf` writes it"] if not found else []
    if not base_info.architecture:
        notes.append("the base was not found, so whether its rows are known was not looked at")
    return Verdict(target="gguf", obstacles=tuple(found), notes=tuple(notes))


def _strange(own: Iterable[Update]) -> list[Incompatibility]:
    """Return layers that have no name in a GGUF file."""
    names = [one.path for one in own if one.ending == ".lora_A.weight" and one.path != "lm_head"]
    known = tuple(f".{name}" for name in LAYERS.values())
    if strange := [name for name in names if not name.endswith(known)]:
        return [Incompatibility(what=f"no name in a GGUF file for {join_limited(strange, 3)}", remedy=MERGE)]
    return []


def _peft(stored: AdapterFolder, base_info: BaseInfo) -> Verdict:
    kind = stored.fields.get("peft_type")
    if not spec_of_file(kind).in_peft:
        what = f"peft has no method {kind}"
        return Verdict(target="peft", obstacles=(Incompatibility(what=what, remedy=_way(stored)),))
    others = any(tensor.ndim > 2 or ".base_layer." in key for key, tensor in stored.tensors.items())
    others = others or bool(stored.fields.get("target_parameters"))
    if not (others and spec_of(stored.config).low_rank):
        return Verdict(target="peft", obstacles=())
    reasons = differs_in_peft(load_with_base(stored.path).adapter)
    found = tuple(Incompatibility(what=reason, remedy=MERGE) for reason in reasons)
    return Verdict(target="peft", obstacles=found)


def _beyond_updates(stored: AdapterFolder, engine: str) -> list[Incompatibility]:
    """Return what an adapter has beside low-rank updates of linear layers and embeddings."""
    config = stored.config
    if not spec_of(config).low_rank:
        kind = type(config).__name__
        what = f"the method is {kind}, and {engine} reads low-rank updates alone"
        return [Incompatibility(what=what, remedy=_way(stored))]
    found = []
    if config.dora:
        found.append("DoRA's lengths of rows")
    if config.modules_to_save:
        found.append(f"modules trained in full ({join_limited(config.modules_to_save)})")
    if config.token_rows:
        found.append(f"{len(config.token_rows)} trained rows of the embedding")
    low_rank = (*ENDINGS, *ENDINGS.values())
    layers = {k: t for k, t in stored.tensors.items() if k.endswith(low_rank)}
    if any(tensor.ndim > 2 for tensor in layers.values()):
        found.append("updates of convolutions")
    if any(".base_layer.out_proj." in key for key in layers):
        found.append("updates of nn.MultiheadAttention")
    return [Incompatibility(what=f"{what}: {engine} does not read them", remedy=MERGE) for what in found]


def _way(stored: AdapterFolder) -> str:
    return MERGE if spec_of(stored.config).merges else NONE


def _embedding(own: Iterable[Update]) -> bool:
    return any(one.ending == ".lora_embedding_A" or one.path == "lm_head" for one in own)


def _packed(stored: AdapterFolder, others: tuple[str, ...]) -> str:
    """Return how the base was packed in training, if the engine's is not."""
    how = str(stored.record.get("base", {}).get("quantize", "none"))
    return how if how in others else ""


def _uneven(stored: AdapterFolder) -> str:
    kind = stored.fields.get("peft_type")
    if kind != "LORA":
        return f"the file says {kind}, and vLLM reads LORA alone"
    return "ranks or scales differ between modules, which older versions of vLLM do not read"


def _checked(stored: AdapterFolder, target: str, model: Any) -> Verdict:
    return check_folder(stored, target, _base_info_of(stored, model))


def _base_info_of(stored: AdapterFolder, model: Any) -> BaseInfo:
    """Return the base that was given, or that the folder names where it can be found."""
    if model is not None and model != "":
        return read_base_info(model)
    record = stored.record.get("base", {})
    name = record.get("name") or stored.fields.get("base_model_name_or_path")
    try:
        return read_base_info(str(name)) if name else BaseInfo()
    except ModelError:
        return BaseInfo(architecture=record.get("architecture"))


ENGINES: dict[str, Callable[[AdapterFolder, BaseInfo], Verdict]] = {"vllm": _vllm, "gguf": _gguf, "peft": _peft}
