"""audit(): one adapter through every engine that is installed, beside fp32 eager."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.artefacts.audit.answers import Answers, Distance, answers_of, distance, largest
from loralab.artefacts.audit.engines import ENGINES, Engine, Question, answer
from loralab.artefacts.audit.reference import Load, Prompts, Reference, loader, measure, wrong_scales
from loralab.artefacts.audit.report import AGREES, DIFFERS, NO_ANSWER, NOT_INSTALLED, AuditReport, EngineVerdict
from loralab.artefacts.loaded_adapter import sample_of
from loralab.errors import AdapterFileError, ConfigError, join_limited, nearest
from loralab.models import load as models
from loralab.models.kinds import CAUSAL
from loralab.models.source import has_tokenizer, resolve
from loralab.tasks.given import read
from loralab.tasks.samples import SAMPLES, TOKENS, sample_inputs
from loralab.values import check_choice

# In KL, so a factor of three in the logits. Real engines were at most 1.5 times as far as the farthest honest way
# in the mean, and 3.5 times at the worst position (docs/engines.md).
MARGIN = 10.0
Listener = Callable[[str], None]


def audit(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    engines: Sequence[str] = tuple(ENGINES),
    data: Any = None,
    precision: str = "fp32",
    output: str | Path | None = None,
    listener: Listener | None = None,
) -> AuditReport:
    """Ask every engine for the same distributions, and compare them with fp32 eager.

    Args:
        base: short name, folder, GGUF file or hub id; None is the base that the adapter names.
        engines: of ENGINES; one that is not installed is named in the report.
        data: rows whose prompts are asked, of any form that training takes; None is the adapter's
            own sample, some sentences, or random token ids where there is no tokenizer.
        precision: fp32, bf16 or fp16, that engines are asked to compute in.
        output: a folder for audit.html and audit.json.
        listener: called with the name of what begins.

    Raises:
        InputError: the adapter, the base, the data or an engine's name is wrong.
    """
    chosen = _chosen(engines)
    check_choice("precision", precision, tuple(models.DTYPES))
    stored = folder.read(Path(adapter))
    name = _base_of(stored, base)
    _require_language_model(name)
    load = loader(stored.path, name)
    prompts, rows = _prompts(stored, name, data)
    tell = listener or (lambda _: None)
    tell("fp32 eager")
    present = {key: engine for key, engine in chosen.items() if engine.python() is not None}
    precisions = [precision, *(engine.precision or precision for engine in present.values())]
    reference = measure(load, prompts, precisions)
    allowed = {own: largest([*ways.values()], MARGIN) for own, ways in reference.honest.items()}
    question = Question(base=name, adapter=stored.path, record=stored.record, prompts=prompts, precision=precision)
    verdicts = []
    for key in chosen:
        tell(key)
        verdicts.append(_judged(key, question, load, reference, allowed))
    undecidable = tuple(own for own, most in allowed.items() if reference.without.within(most))
    report = AuditReport(
        adapter=str(stored.path),
        base=name,
        precision=precision,
        prompts=len(prompts),
        positions=len(reference.values),
        rows=rows,
        engines=tuple(verdicts),
        without=reference.without,
        honest=reference.honest,
        margin=MARGIN,
        notes=tuple(map(_weakness, undecidable)),
        undecidable=undecidable,
    )
    if output is not None:
        report.write(Path(output))
    return report


def _chosen(names: Sequence[str]) -> dict[str, Engine]:
    if not names:
        raise ConfigError("name at least one engine", code="missing_option", field="engines")
    for name in names:
        if name not in ENGINES:
            raise ConfigError(
                f"there is no engine {name!r}, only {join_limited(ENGINES)}{nearest(name, ENGINES)}",
                code="unknown_engine",
                field="engines",
            )
    return {name: ENGINES[name] for name in names}


def _base_of(stored: AdapterFolder, base: str | Path | None) -> str:
    name = base or stored.record.get("base", {}).get("name") or stored.fields.get("base_model_name_or_path")
    if not name:
        raise AdapterFileError(
            f"{stored.path} does not name its base model; give it with --base", code="base_needed", field="base"
        )
    return str(name)


def _require_language_model(base: str) -> None:
    if (kind := models.natural_kind(base)) != CAUSAL:
        raise ConfigError(
            f"{base} is a model of kind {kind}; an audit compares language models", code="not_causal", field="base"
        )


def _prompts(stored: AdapterFolder, base: str, data: Any) -> tuple[Prompts, str]:
    """Return token ids to ask with, and where they are from.

    Raises:
        ConfigError: rows are given, and there is no tokenizer to read them.
    """
    if not has_tokenizer(resolve(base)):
        if data is not None:
            raise ConfigError(f"{base} has no tokenizer to read rows with", code="no_tokenizer", field="data")
        return _random_ids(models.configuration(base).get_text_config().vocab_size), "random ids"
    if data is None and stored.record.get("sample"):
        return [list(ids) for ids in stored.record["sample"]], "the adapter's own"
    live = models.load(base, kind=CAUSAL)
    if data is None:
        return sample_of({}, live), "packaged sentences"
    task = read(data)
    split = "validation" if task.splits.get("validation") else next(iter(task.splits))
    return [list(ids) for ids in sample_inputs(task, live.tokenizer, kind=CAUSAL, split=split)], str(data)


def _weakness(precision: str) -> str:
    return f"what the adapter does is as small as the rounding of {precision}: without it an engine would agree, too"


def _random_ids(vocabulary: int) -> Prompts:
    draw = torch.Generator().manual_seed(0)
    ids: Prompts = torch.randint(vocabulary, (SAMPLES, TOKENS // 2), generator=draw).tolist()
    return ids


def _judged(
    key: str, question: Question, load: Load, reference: Reference, allowed: dict[str, Distance]
) -> EngineVerdict:
    """Ask an engine, judge what it says, and look for the cause where it differs."""
    engine = ENGINES[key]
    found = None if engine.python() is None else answer(engine, question)
    start = EngineVerdict(engine=key, verdict=NO_ANSWER, precision=engine.precision or question.precision)
    verdict = _verdict(start, found, reference, allowed)
    if verdict.verdict == DIFFERS and isinstance(found, Answers):
        return _explained(verdict, found, load, replace(question, adapter=None), reference)
    return verdict


def _verdict(
    start: EngineVerdict, found: Answers | str | None, reference: Reference, allowed: dict[str, Distance]
) -> EngineVerdict:
    """Judge the answers of an engine, or why there are none; None is one that is not installed."""
    if found is None:
        return replace(start, verdict=NOT_INSTALLED, detail=ENGINES[start.engine].install)
    if isinstance(found, Answers) and len(found.values) != len(reference.values):
        found = f"{len(found.values)} positions of {len(reference.values)}"
    if isinstance(found, str):
        return replace(start, detail=found)
    most = allowed[start.precision]
    own = distance(reference.values, found)
    return replace(start, verdict=AGREES if own.within(most) else DIFFERS, distance=own, allowed=most)


def _explained(own: EngineVerdict, found: Answers, load: Load, alone: Question, reference: Reference) -> EngineVerdict:
    """Say what an engine that differs has most likely computed.

    Args:
        alone: the question to the base alone.
    """
    assert own.allowed is not None
    if distance(reference.base, found).within(own.allowed):
        return replace(own, cause="adapter_left_out", detail="its answers are those of the base alone")
    for factor, logits in wrong_scales(load, alone.prompts):
        if distance(answers_of(logits).values, found).within(own.allowed):
            text = f"its answers are those of the update multiplied by {factor:.3g}"
            return replace(own, cause="scaled", factor=factor, detail=text)
    base = answer(ENGINES[own.engine], alone)
    if isinstance(base, Answers) and not distance(reference.base, base).within(own.allowed):
        return replace(own, cause="base_differs", detail="it already differs on the base without the adapter")
    return replace(own, cause="unknown", detail="the base alone agrees; what it does to the update is not known")
