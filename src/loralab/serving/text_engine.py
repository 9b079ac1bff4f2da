"""The engine of a language model: texts token by token, and classes by the chances of their labels."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.adapters.store import Store
from loralab.serving.constraints import Compiled, Grammar
from loralab.serving.engine import Engine
from loralab.serving.live_request import Generation, LabelScoring, message_of
from loralab.serving.request import FAILED, Answer, Completed, Ranked, Sampling
from loralab.serving.request_builder import RequestBuilder, unlabelled
from loralab.serving.runners.choose import ModelRunner
from loralab.serving.sampling import choose_tokens, to_readable
from loralab.serving.scheduler import Chunk, Scheduler, TokenSequence
from loralab.serving.settings import ServeSettings


class TextEngine(Engine[Generation | LabelScoring]):
    """A language model and its adapters.

    Args:
        runner, context: as in `Engine`.
        scheduler: who runs next.
    """

    def __init__(
        self,
        base: Base,
        store: Store,
        settings: ServeSettings,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        context: int,
    ) -> None:
        super().__init__(base, store, settings, runner=runner, context=context)
        self._scheduler, self._builder = scheduler, RequestBuilder(base, context)

    def start(self) -> None:
        """Begin to work; what structures need is made before, as it would hold up every answer."""
        with contextlib.suppress(ConfigError):  # a request for structure is told why there is none
            self._builder.constraints.tables("structured_outputs")
        super().start()

    @property
    def slower(self) -> dict[str, str]:
        """Return the faster runners that are not used, with the reasons."""
        return dict(self._runner.refused)

    def refusal(self, what: str, entry: AdapterInfo | None) -> str:
        """Return why something cannot be asked of an adapter; empty if it can."""
        if what in ("completions", "chat"):
            return ""
        if what == "classify":
            return unlabelled(entry, self.base.name)
        return f"{self.base.name} is a language model, which writes text: it makes no vectors and scores no pairs"

    def submit(
        self,
        prompt: Sequence[int],
        *,
        adapter: AdapterInfo | str | None,
        sampling: Sampling,
        structure: Compiled | None = None,
    ) -> Answer:
        """Ask for an answer to a prompt (token ids); returns at once.

        Args:
            adapter: a name or digest of the store, or a sum such as a:0.7+b:0.3; None is the base
                alone. An entry of the store is asked itself, though its name may have moved since.
            structure: that the answer must have, of `compile`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            QueueFullError: too many wait already, or the engine is closing.
            DataError: the prompt is empty, or leaves no room for an answer.
        """
        live = self._builder.generation(prompt, self._entry(adapter), sampling, structure)
        self._enter(live)
        return live.answer

    def classify(self, inputs: Sequence[str | bytes], *, adapter: AdapterInfo | str | None) -> "Future[list[Ranked]]":
        """Ask for the classes of texts.

        Raises:
            AdapterNotFoundError, QueueFullError: as in `submit`.
            DataError: an input is too long or no text, or the adapter knows no labels.
        """
        live = self._builder.classification(inputs, self._entry(adapter))
        self._enter(live)
        return live.future

    def compile(self, grammar: Grammar) -> Compiled:
        """Return a structure for answers of any adapter; takes up to a tenth of a second.

        Raises:
            ConfigError: it is too large or does not compile, or llguidance is missing.
        """
        return self._builder.constraints.compile(grammar)

    def tokenizer(self, entry: AdapterInfo | None) -> Any:
        """Return the tokenizer with the chat template that an adapter was trained with.

        Raises:
            DataError: the template cannot be used.
        """
        return self._builder.tokenizers.of(entry).tokenizer

    def generate(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None], sampling: Sampling
    ) -> list[Completed]:
        """Return the answers to some prompts, each by its adapter; for callers without HTTP."""
        pairs = zip(prompts, adapters, strict=True)
        answers = [self.submit(p, adapter=a, sampling=sampling) for p, a in pairs]
        if not self._threads:
            self.run_until_idle()
        return [answer.result() for answer in answers]

    @property
    def running(self) -> int:
        """Return how many sequences are in the batch."""
        return len(self._scheduler.running)

    @property
    def _queued(self) -> int:
        return self._scheduler.waiting

    def _take_in(self, live: Generation | LabelScoring) -> None:
        for sequence in live.sequences:
            self._scheduler.add(sequence)

    def _take_out(self, live: Generation | LabelScoring) -> None:
        for sequence in live.sequences:
            self._scheduler.remove(sequence)
            self._runner.forget(sequence)

    def _work(self) -> int:
        chunks = self._scheduler.plan()
        self._run_chunks(chunks)
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def _run_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Compute some chunks; a failure ends only the request that it belongs to."""
        try:
            self._compute(chunks)
        except Exception as error:
            if len(chunks) == 1:
                self._finish(self._live[chunks[0].sequence.number], FAILED, message_of(error))
                return
            for chunk in chunks:
                if chunk.sequence.number in self._live:
                    self._run_chunks([chunk])

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        pairs = [(chunk, own) for chunk in chunks if (own := self._load_prefix(chunk))]
        logits = self._runner.logits([own for _, own in pairs]) if pairs else []
        for chunk in chunks:
            self._scheduler.advance(chunk)
        due = []
        for (_, own), found in zip(pairs, logits, strict=True):
            live = self._live[own.sequence.number]
            if isinstance(live, LabelScoring):
                if live.take_logits(own.sequence, own, found):
                    self._scheduler.remove(own.sequence)
                    if live.accept():
                        self._finish(live, "")
                continue
            if live.take_logits(own.sequence, own, found):
                due.append((live, own.sequence, found[-1]))
            elif live.finished is not None:
                self._finish(live, "")
            self._scheduler.keep_scores(own.sequence)
        self._sample(due)

    def _sample(self, due: Sequence[tuple[Any, TokenSequence, torch.Tensor]]) -> None:
        """Sample a token for each sequence that is due one."""
        if not due:
            return
        draws = [live.sampler for live, _, _ in due]
        logits = to_readable(torch.stack([own for _, _, own in due]), draws)
        tokens = choose_tokens(logits, draws)
        for (live, sequence, _), own, token in zip(due, logits, tokens, strict=True):
            if live.accept(sequence, own, token):
                self._finish(live, "")

    def _load_prefix(self, chunk: Chunk) -> Chunk | None:
        """Put a prefix into the cache; return the rest of the chunk, if any."""
        prefix_kv = self._live[chunk.sequence.number].prefix_kv
        return chunk if prefix_kv is None else self._runner.load_prefix(chunk, prefix_kv)
