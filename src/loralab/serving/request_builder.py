"""Build live requests for a language model; every error in the input is raised here."""

import itertools
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from loralab.errors import DataError
from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.adapters.tokenizers import AdapterTokenizers
from loralab.serving.constraints import Compiled, Constraints
from loralab.serving.detokenize import TokenBytes
from loralab.serving.live_request import Generation, LabelScoring
from loralab.serving.prompt_scores import MAX_ALTERNATIVES
from loralab.serving.request import Answer, Sampling
from loralab.serving.scheduler import TokenSequence
from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer_ids, prompt_ids
from loralab.tasks.forward import require_known

UNLIKE_TRAINING = (
    "the adapter was trained on prompts as /v1/chat/completions writes them, and this one does not "
    "end so: ask there, or write the chat template into the prompt"
)


class RequestBuilder:
    """Makes live requests for one base.

    Args:
        context: the most tokens of a request, its prefix and its answer included.

    Attributes:
        tokenizers: how each adapter's prompts are written.
        constraints: structures that answers may have.
    """

    def __init__(self, base: Base, context: int) -> None:
        self._base, self._context = base, context
        self.tokenizers = AdapterTokenizers(base)
        self._tokens = TokenBytes(base.tokenizer)
        self._numbers = itertools.count()  # of rows and inputs
        self.constraints = Constraints(base)

    def generation(
        self, prompt: Sequence[int], entry: AdapterInfo | None, sampling: Sampling, structure: Compiled | None = None
    ) -> Generation:
        """Build the request for a text after a prompt, of the structure that `constraints` compiled.

        Raises:
            DataError: the prompt is empty, has unknown tokens, or leaves no room for an answer.
        """
        self._require_fitting(prompt, prefix_tokens_of(entry) + sampling.max_tokens)
        for field in ("logit_bias", "stop_token_ids"):
            require_tokens(self._base.model, getattr(sampling, field), field)
        unended = sampling.ignore_eos and structure is None
        stops = frozenset[int]() if unended else self.tokenizers.of(entry).stops
        tokens = [*range(-prefix_tokens_of(entry), 0), *prompt]
        live: Generation

        def cancel() -> None:
            live.cancelled = True

        answer = Answer(
            id=uuid.uuid4().hex,
            **origin(entry),
            cancel=cancel,
            warning=(structure.warning if structure else "")
            or ("" if self._as_trained(prompt, entry) else UNLIKE_TRAINING),
        )
        live = Generation(
            **origin(entry),
            prompt=tuple(prompt),
            sampling=sampling,
            stops=stops.union(sampling.stop_token_ids),
            tokens=self._tokens,
            answer=answer,
            constraint=None if structure is None else self.constraints.begin(structure, stops),
            sequences=[self._sequence(tokens, entry, sampling)],
        )
        return live

    def _sequence(self, tokens: list[int], entry: AdapterInfo | None, sampling: Sampling) -> TokenSequence:
        told = -1 if sampling.logprobs is None or not sampling.echo else sampling.logprobs
        return TokenSequence(
            number=next(self._numbers),
            key=digest_of(entry),
            tokens=tokens,
            scored=prefix_tokens_of(entry) + 1 if told >= 0 else None,
            continued=sampling.max_tokens > 0,
            alternatives=told if told <= MAX_ALTERNATIVES else -1,
        )

    def _as_trained(self, prompt: Sequence[int], entry: AdapterInfo | None) -> bool:
        """Return whether a prompt ends as those that the adapter has learnt to answer."""
        if entry is None or entry.form in (None, "text"):
            return True
        trained = self.tokenizers.of(entry)
        if trained.tokenizer.chat_template:
            return tuple(prompt[len(prompt) - len(trained.opening) :]) == trained.opening
        return self._tokens.decode(prompt[-1:])[-1:].isspace() or not trained.opening

    def classification(self, inputs: Sequence[str | bytes], entry: AdapterInfo | None) -> LabelScoring:
        """Build the request for the classes of texts.

        Raises:
            DataError: no labels are known, or an input is too long or no text.
        """
        require_inputs(inputs, str, self._base.name)
        if entry is None:
            raise DataError(unlabelled(None, self._base.name), code="no_labels")
        return self._label_scoring([str(text) for text in inputs], entry, task_of(entry))

    def _label_scoring(self, texts: Sequence[str], entry: AdapterInfo | None, task: Task) -> LabelScoring:
        tokenizer, prefix = self.tokenizers.of(entry).tokenizer, list(range(-prefix_tokens_of(entry), 0))
        digest = digest_of(entry)
        rows, prompt_tokens, single, firsts = [], [], True, []
        for text in texts:
            row = {"text": text, "label": task.labels[0]}
            prompt = prompt_ids(task, row, tokenizer)
            ends = [answer_ids(task, row, tokenizer, label) for label in task.labels]
            self._require_fitting(prompt, len(prefix) + max(map(len, ends)))
            require_known(self._base.model, tokenizer, ends)
            prompt_tokens.append(len(prompt))
            single = single and all(len(end) == 2 for end in ends)  # one token and the end
            firsts = [end[0] for end in ends]
            rows.append((prompt, ends))
        made = [
            TokenSequence(
                number=next(self._numbers),
                key=digest,
                tokens=[*prefix, *prompt, *end],
                scored=None if single else len(prefix) + len(prompt),
            )
            for prompt, ends in rows
            for end in ([()] if single else ends)
        ]
        return LabelScoring(
            **origin(entry),
            labels=task.labels,
            prompt_tokens=prompt_tokens,
            firsts=firsts if single else (),
            sequences=made,
            future=Future(),
        )

    def _require_fitting(self, prompt: Sequence[int], more: int) -> None:
        if not prompt:
            raise DataError("the prompt is empty", code="invalid_value", field="prompt")
        require_tokens(self._base.model, prompt, "prompt")
        if len(prompt) + more > self._context:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and asks for {more} more, and the model can "
                f"take {self._context} in all",
                code="context_length_exceeded",
                field="prompt",
            )


def prefix_tokens_of(entry: AdapterInfo | None) -> int:
    """Return the positions that an adapter's prefix takes before every prompt."""
    return 0 if entry is None else entry.prefix_tokens


def digest_of(entry: AdapterInfo | None) -> str | None:
    """Return the digest that the name stands for now."""
    return None if entry is None else entry.digest


def origin(entry: AdapterInfo | None) -> dict[str, Any]:
    """Return the fields of a request that say which adapter it is for."""
    if entry is None:
        return {"adapter": None, "digest": None}
    return {"adapter": entry.name, "digest": entry.digest, "parts": entry.parts}


def require_inputs(inputs: Sequence[Any], wanted: type, base: str) -> None:
    """Refuse no inputs, and inputs of another kind.

    Raises:
        DataError: there is one.
    """
    if not inputs:
        raise DataError("there is no input", code="invalid_value", field="input")
    for number, value in enumerate(inputs):
        if not isinstance(value, wanted):
            what = "pictures" if wanted is bytes else "texts"
            raise DataError(f"input {number}: {base} takes {what}", code="invalid_value", field="input")


def require_tokens(model: Any, tokens: Iterable[int], field: str, where: str = "") -> None:
    """Refuse numbers that are no tokens of a model; `where` in the field they stand, if not in all of it.

    Raises:
        DataError: there is one.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if (strange := next((t for t in tokens if not 0 <= t < known), None)) is not None:
        raise DataError(
            f"{where or field}: {strange} is not a token of the model; they go from 0 to {known - 1}",
            code="invalid_value",
            field=field,
        )


def unlabelled(entry: AdapterInfo | None, base: str = "") -> str:
    """Return why an adapter, or a base of this name alone, puts nothing into classes; empty if it does."""
    if entry is None:
        return f"{base} alone knows no classes; name an adapter that does"
    if not entry.labels:
        return f"{entry.name} was not trained to tell classes apart; it has no labels"
    return f"{entry.name} compares two texts, which are not put into classes" if entry.form == "pair-label" else ""


def task_of(entry: AdapterInfo) -> Task:
    """Return the classes that an adapter was trained to tell apart, without rows.

    Raises:
        DataError: it has none, or they are of pairs.
    """
    if reason := unlabelled(entry):
        raise DataError(reason, code="no_labels")
    return Task(
        name=entry.name,
        format=entry.form or "text-label",
        splits={},
        labels=entry.labels,
        instruction=entry.instruction or "",
    )
