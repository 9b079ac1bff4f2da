"""card(): the README.md of an artefact, as model hubs show it.

All of it is read from the folder: what loralab.json does not say is left out.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from loralab import atomic
from loralab.adapters.registry import spec_of_file
from loralab.artefacts.artefact import ADAPTER, GGUF, MERGED, Artefact, is_hub_id, read_artefact
from loralab.artefacts.card_text import body
from loralab.errors import ConfigError, OutputError
from loralab.models import kinds
from loralab.models.catalog import MODELS

README = "README.md"
MARK, END = "<!-- loralab card ", " -->\n"  # with the digest of what stands before it
PIPELINES = {
    kinds.CAUSAL: "text-generation",
    kinds.SEQ2SEQ: "text-generation",
    kinds.CLASSIFIER: "text-classification",
    kinds.MULTI_LABEL: "text-classification",
    kinds.REGRESSION: "text-classification",
    kinds.RERANKER: "text-ranking",
    kinds.TAGGER: "token-classification",
    kinds.VISION: "image-classification",
    kinds.SENTENCES: "sentence-similarity",
    kinds.IMAGE_TEXT: "image-text-to-text",
}
# metrics that a hub knows by another name
METRICS = {"macro_f1": "f1", "entity_f1": "f1", "matthews": "matthews_correlation", "rouge_l": "rouge"}
RELATIONS = {ADAPTER: "adapter", GGUF: "adapter", MERGED: "finetune"}
LICENCES = ("apache-2.0", "mit")  # of bases with a short name, as the hub spells them


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model card: its file, the fields of its front matter, and its whole text."""

    path: Path
    metadata: Mapping[str, Any]
    text: str


def card(
    run: str | Path,
    *,
    base_model: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    repo: str | None = None,
    overwrite: bool = False,
) -> Card:
    """Write the model card of an adapter folder, a merged model or an export to its README.md.

    Args:
        base_model: id of the base on the hub; None is what the folder's own record tells.
        license: id of a licence as the hub spells it; None is that of a base with a short name.
        dataset: id of the data on the hub; None is the recorded one, if the hub's cache has it.
        repo: id on the hub that this folder will have; None leaves its own name.
        overwrite: also a README.md that somebody has written or changed.

    Raises:
        ConfigError: an id is not like ORG/NAME.
        AdapterFileError: the folder is no artefact, or is damaged.
        OutputError: README.md is somebody's own, or cannot be written.
    """
    require_ids(base_model=base_model, dataset=dataset, repo=repo)
    artefact = read_artefact(Path(run), base_id=base_model, data_id=dataset, repo=repo)
    file = artefact.path / README
    if not overwrite and is_somebodys(file):
        raise OutputError(
            f"{file} was written or changed by somebody; --overwrite replaces it", code="output_exists", field="run"
        )
    metadata = metadata_of(artefact, license)
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body(artefact)}\n"
    text += f"{MARK}{_digest(text)}{END}"
    atomic.write_file(file, text)
    return Card(path=file, metadata=metadata.to_dict(), text=text)


def require_ids(**given: str | None) -> None:
    """Require ids of a hub.

    Raises:
        ConfigError: one is not like ORG/NAME.
    """
    for name, value in given.items():
        if value is not None and not is_hub_id(value):
            raise ConfigError(f"{name} must be like ORG/NAME, got {value!r}", code="not_an_id", field=name)


def is_somebodys(file: Path) -> bool:
    """Return whether there is something that `card` did not write, or that was changed since."""
    try:
        text, mark, digest = file.read_text(encoding="utf-8", errors="replace").rpartition(MARK)
    except OSError:  # a folder, or a file that cannot be read
        return file.exists()
    return not mark or digest != _digest(text) + END


def metadata_of(artefact: Artefact, license: str | None = None) -> ModelCardData:
    """Return the front matter; what is not known is not in it."""
    results = _results(artefact)
    tags = ["loralab", *filter(None, [artefact.method]), *(["gguf"] if artefact.form == GGUF else [])]
    relation: dict[str, Any] = {"base_model_relation": RELATIONS[artefact.form]} if artefact.base_id else {}
    return ModelCardData(
        base_model=artefact.base_id,
        library_name=_library(artefact),
        license=license or _licence_of_base(artefact),
        pipeline_tag=PIPELINES.get(artefact.kind),
        datasets=[artefact.data_id] if artefact.data_id else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=tags,
        model_name=artefact.name if results else None,
        eval_results=results or None,
        **relation,
    )


def _library(artefact: Artefact) -> str | None:
    """Return the library that loads it, by its name on the hub."""
    if artefact.stored is not None:
        return "peft" if spec_of_file(artefact.stored.fields.get("peft_type")).in_peft else "loralab"
    return "transformers" if artefact.form == MERGED else None


def _licence_of_base(artefact: Artefact) -> str | None:
    licence = MODELS[artefact.short_name].licence.lower() if artefact.short_name else ""
    return licence if licence in LICENCES else None


def _results(artefact: Artefact) -> list[EvalResult]:
    name = artefact.data_name or "data"
    return [
        EvalResult(
            task_type=PIPELINES.get(artefact.kind, "other"),
            dataset_type=artefact.data_id or re.sub(r"[^\w.\-]+", "-", name, flags=re.ASCII),
            dataset_name=name,
            dataset_split=split,
            metric_type=METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for split, own in artefact.part("metrics").items()
        for metric, value in own.items()
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
