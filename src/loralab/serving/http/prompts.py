"""Steps of requests for texts: prompt, chat template, room for an answer, structure."""

import asyncio
import contextlib
import functools
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, cast

from loralab.errors import LoralabError
from loralab.serving.constraints import Compiled, Grammar
from loralab.serving.http.errors import RETRY_SECONDS, ApiError, to_api_error, wrong_value
from loralab.serving.http.service import Service
from loralab.tasks.catalog import Task
from loralab.tasks.encode import prompt_ids
from loralab.tasks.segments import opening

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo
    from loralab.serving.text_engine import TextEngine

COMPILE_SECONDS = 5.0  # of a structure; as a rule it takes milliseconds
MAX_COMPILING = 8
TEXT = Task(name="text", format="text", splits={})


class Prompts:
    """Parts of requests for texts, for the engine of a service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._compiling = deque[None]()  # structures, those included that nobody waits for any more

    @property
    def engine(self) -> "TextEngine":
        """Return the engine, of a model that can be asked for texts."""
        return cast("TextEngine", self.service.engine)

    async def text_ids(self, prompt: str | list[int]) -> Sequence[int]:
        """Return the tokens of a plain prompt.

        Raises:
            ApiError: 400, it is empty, or a number is not a token.
        """
        if isinstance(prompt, str):
            self.service.require_fitting(len(prompt), "prompt")
            row = {"text": prompt}
            prompt = list(
                await self.service.run_in_tokenizer_thread(lambda: prompt_ids(TEXT, row, self.engine.base.tokenizer))
            )
        size = len(self.engine.base.tokenizer)
        self.service.require_fitting(len(prompt), "prompt")  # so few numbers are looked at quickly
        if bad := [number for number in prompt if not 0 <= number < size]:
            raise ApiError(
                400,
                f"prompt: {bad[0]} is not a token; they go from 0 to {size - 1}",
                param="prompt",
                code="invalid_value",
            )
        if not prompt:
            raise wrong_value("prompt", "is empty")
        return prompt

    async def chat_ids(
        self, turns: list[dict[str, Any]], entry: "AdapterInfo | None", tools: Sequence[Mapping[str, Any]] = ()
    ) -> Sequence[int]:
        """Return the tokens of a conversation and the opening of its next turn, as in training.

        Raises:
            DataError: the chat template refuses it.
            ApiError: 400, it is far too long.
        """
        self.service.require_fitting(sum(1 + len(turn["content"]) for turn in turns), "messages")
        if tools:
            self.service.require_fitting(len(json.dumps(tools)), "tools")
        return await self.service.run_in_tokenizer_thread(lambda: opening(self.engine.tokenizer(entry), turns, tools))

    def max_answer_tokens(self, ids: Sequence[int], entry: "AdapterInfo | None", param: str) -> int:
        """Return the number of tokens that an answer to a prompt can have.

        Raises:
            ApiError: 400, there are none.
        """
        prefix = 0 if entry is None else entry.prefix_tokens
        left = self.engine.context - prefix - len(ids)
        if left < 1:
            before = f" and the adapter's prefix {prefix}" if prefix else ""
            raise ApiError(
                400,
                f"{param}: it has {len(ids)} tokens{before}, and at most "
                f"{self.engine.context} fit with at least one of the answer",
                param=param,
                code="context_length_exceeded",
            )
        return left

    async def structure(self, grammar: Grammar | None) -> Compiled | None:
        """Return a structure for answers, compiled in a thread of its own.

        Raises:
            ApiError: 400, it cannot be, or takes too long; 503, too many that do are still compiled.
        """
        if grammar is None:
            return None
        if len(self._compiling) >= MAX_COMPILING:
            raise ApiError(503, "too many structures are compiled now", code="busy", retry_after=RETRY_SECONDS)
        future: Future[Compiled] = Future()
        self._compiling.append(None)
        work = functools.partial(self.engine.compile, grammar)
        threading.Thread(target=self._resolve, args=(future, work), daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), COMPILE_SECONDS)
        except TimeoutError:
            text = f"{grammar.field} takes more than {COMPILE_SECONDS:g} seconds to compile"
            raise ApiError(400, text, param=grammar.field, code=f"invalid_{grammar.kind}") from None
        except LoralabError as error:
            raise to_api_error(error) from None

    def _resolve(self, future: "Future[Compiled]", work: Callable[[], Compiled]) -> None:
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
            finally:
                self._compiling.pop()
