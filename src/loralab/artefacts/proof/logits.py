"""Logits of base with adapter and of the merged model on the same ids, both computed in fp32.

What the weights cannot show: a configuration that makes another computation of the same tensors.
"""

from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loralab.adapters.load import load as load_adapter
from loralab.artefacts.comparison import Certificate, compare, logits_of, reference_of
from loralab.errors import LoralabError
from loralab.models.kinds import CAUSAL, CLASSIFIER, LOADERS, SENTENCES, SEQ2SEQ, TAGGER, class_for
from loralab.models.load import configuration
from loralab.models.source import quiet
from loralab.models.weights import Weights
from loralab.progress import Listener, stages
from loralab.system import memory_bytes

PROMPTS, TOKENS = 4, 16
SHARE = 3  # of the memory, that one model in fp32 may take
ADAPTED, MERGED = "asking base and adapter", "asking the merged model"
SHARES = {ADAPTED: 1, MERGED: 1}
KINDS = (CAUSAL, CLASSIFIER, TAGGER, SENTENCES, SEQ2SEQ)


def compare_logits(
    base: Weights, merged: Weights, adapter: Path, precision: str, listener: Listener | None = None
) -> tuple[Certificate | None, str]:
    """Load one model after the other, and compare them.

    Args:
        precision: what the merged weights were rounded to, which says how much may differ.

    Returns:
        the comparison, or None and why there is none.
    """
    if merged.path.is_file() or base.path.is_file():
        return None, "a GGUF file is not opened as a model"
    if any(stream.codec for stream in (*merged.tensors.values(), *base.tensors.values())):
        return None, "the weights are packed"
    if (size := 4 * max(map(_numbers, (base, merged)))) * SHARE > memory_bytes():
        return None, f"a model in fp32 takes {size / 1e9:.1f} GB, too much of the memory"
    try:
        return _compared(base, merged, adapter, precision, stages(SHARES, listener)), ""
    except (LoralabError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        return None, f"{' '.join(str(error).split())[:300]}"


def _compared(
    base: Weights, merged: Weights, adapter: Path, precision: str, begin: Callable[[str], None]
) -> Certificate:
    begin(ADAPTED)
    kind = _kind(merged.path)
    draw = torch.Generator().manual_seed(0)
    live = _opened(base.path, kind, _labels(merged))
    vocabulary = live.get_input_embeddings().num_embeddings
    prompts = torch.randint(0, vocabulary, (PROMPTS, TOKENS), generator=draw).tolist()
    load_adapter(live, adapter)
    reference = reference_of(live, prompts, kind)
    del live
    begin(MERGED)
    found = logits_of(_opened(merged.path, kind, 0), prompts, kind)
    certificate = compare(reference, found, precision)
    # random ids have no clear answer, so which one is first may change with any rounding
    allowed = certificate.tolerance
    passed = certificate.relative_difference <= allowed["relative_difference"]
    return replace(certificate, passed=passed and certificate.mean_kl <= allowed["mean_kl"])


def _opened(path: Path, kind: str, labels: int) -> Any:
    options = {"num_labels": labels} if labels else {}
    with quiet():
        found = LOADERS[kind].from_pretrained(
            str(path), dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )
    return found.eval()


def _kind(path: Path) -> str:
    """Return the kind of the class that a folder was saved from."""
    config = configuration(str(path))
    name = (config.architectures or [""])[0]
    for kind in KINDS:
        built = class_for(config, kind)
        if built is not None and built.__name__ == name:
            return kind
    raise ValueError(f"{name or 'the merged model'} is no text model that can be opened here")


def _labels(merged: Weights) -> int:
    names = merged.config.get("id2label")
    return len(names) if isinstance(names, dict) else 0


def _numbers(weights: Weights) -> int:
    return sum(int(torch.Size(stream.shape).numel()) for stream in weights.tensors.values())


def precision_of(dtypes: Set[torch.dtype]) -> str:
    """Return the coarsest of some dtypes."""
    if torch.bfloat16 in dtypes:
        return "bf16"
    return "fp16" if torch.float16 in dtypes else "fp32"
