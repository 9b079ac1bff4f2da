"""The engine of an encoder: classes, vectors of texts, and scores of pairs, in one pass each."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.adapters.store import Store
from loralab.serving.encoder_request import EncoderRequest, next_inputs
from loralab.serving.encoder_requests import EncoderRequests
from loralab.serving.engine import Engine
from loralab.serving.live_request import message_of
from loralab.serving.request import FAILED, Embeddings, PairScores, Ranked
from loralab.serving.runners.encoder import EncoderRunner
from loralab.serving.settings import ServeSettings
from loralab.tasks.examples import Ids


class EncoderEngine(Engine[EncoderRequest]):
    """An encoder, or a vision model, and its adapters.

    Args:
        context: the most tokens of an input.
        requests: makes the live requests.
    """

    def __init__(
        self, base: Base, store: Store, settings: ServeSettings, *, context: int, requests: EncoderRequests
    ) -> None:
        super().__init__(base, store, settings, runner=EncoderRunner(base), context=context)
        self._requests = requests
        self._queue: deque[EncoderRequest] = deque()

    def refusal(self, what: str, entry: AdapterInfo | None) -> str:
        """Return why something cannot be asked of an adapter; empty if it can."""
        return self._requests.refusal(what, entry)

    def classify(self, inputs: Sequence[str | bytes], *, adapter: AdapterInfo | str | None) -> "Future[list[Ranked]]":
        """Ask for the classes of texts, or of pictures (the bytes of a file each).

        Raises:
            AdapterNotFoundError: there is no such adapter.
            QueueFullError: too many wait already, or the engine is closing.
            DataError: as in `EncoderRequests.classification`.
        """
        return self._entered(self._requests.classification(inputs, self._entry(adapter)))

    def embed(
        self, inputs: Sequence[str | Ids], *, adapter: AdapterInfo | str | None, dimensions: int = 0, truncate: int = 0
    ) -> "Future[Embeddings]":
        """Ask for the vectors of texts, or of token ids.

        Raises:
            AdapterNotFoundError, QueueFullError: as in `classify`.
            DataError: as in `EncoderRequests.embedding`.
        """
        entry = self._entry(adapter)
        return self._entered(self._requests.embedding(inputs, entry, dimensions=dimensions, truncate=truncate))

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        adapter: AdapterInfo | str | None,
        activation: bool = True,
        truncate: int = 0,
    ) -> "Future[PairScores]":
        """Ask how well the second text of each pair fits the first.

        Raises:
            AdapterNotFoundError, QueueFullError: as in `classify`.
            DataError: as in `EncoderRequests.scores`.
        """
        entry = self._entry(adapter)
        return self._entered(self._requests.scores(pairs, entry, activation=activation, truncate=truncate))

    def tokenizer(self, entry: AdapterInfo | None) -> Any:
        """Return the base's tokenizer: adapters of encoders have no template."""
        return self.base.tokenizer

    @property
    def running(self) -> int:
        """Return how many inputs can be in the next step."""
        return min(self._max_batch, len(self._live))

    @property
    def _queued(self) -> int:
        return len(self._live) - self.running

    def _entered(self, live: EncoderRequest) -> "Future[Any]":
        self._enter(live)
        return live.future

    def _take_in(self, live: EncoderRequest) -> None:
        self._queue.append(live)

    def _take_out(self, live: EncoderRequest) -> None:
        if live in self._queue:
            self._queue.remove(live)

    def _work(self) -> int:
        chosen = next_inputs(self._queue, self._max_batch)
        if chosen:
            self._compute(sorted(chosen, key=lambda pair: pair[0].digest or ""))
        return sum(max(1, len(live.examples[number].input_ids)) for live, number in chosen)

    def _compute(self, chosen: Sequence[tuple[EncoderRequest, int]]) -> None:
        """Compute some inputs; a failure ends only the request that it belongs to."""
        try:
            outputs = self._runner.outputs([(live.digest, live.examples[n], live.reading) for live, n in chosen])
            for (live, number), output in zip(chosen, outputs, strict=True):
                self._live.pop(number, None)
                if live.finished is None and live.accept(number, output):
                    self._finish(live, "")
        except Exception as error:
            if len(chosen) == 1:
                self._finish(chosen[0][0], FAILED, message_of(error))
                return
            for one in chosen:
                if one[0].finished is None:
                    self._compute([one])
