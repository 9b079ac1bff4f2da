"""Checks with OpenAI's own client against a server of adapters, whichever engine answers.

Each check takes a `Place`; the answers are greedy, so a check may ask twice and compare.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

SPARE = "one-more"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server: its address without /v1, what it serves, and a prompt that its base knows."""

    url: str
    base: str
    adapters: tuple[str, ...]
    prompt: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)

    def write(self, model: str, **more: Any) -> Any:
        """Return a completion of the prompt, eight tokens long by default."""
        options = {"max_tokens": 8, "temperature": 0, **more}
        with self.client() as client:
            found = client.completions.create(model=model, prompt=self.prompt, **options)
            return list(found) if more.get("stream") else found

    def chat(self, model: str, **more: Any) -> Any:
        options = {"max_tokens": 6, "temperature": 0, **more}
        with self.client() as client:
            messages = [{"role": "user", "content": self.prompt}]
            found = client.chat.completions.create(model=model, messages=messages, **options)
            return list(found) if more.get("stream") else found


def lists_the_base_and_its_adapters(place: Place) -> None:
    with place.client() as client:
        names = [model.id for model in client.models.list()]
    assert names[0] == place.base
    assert sorted(names[1:]) == sorted(place.adapters)


def writes_greedily(place: Place) -> None:
    texts = {}
    for name in (place.base, *place.adapters):
        found = place.write(name)
        assert found.choices[0].finish_reason in ("length", "stop")
        assert 0 < found.usage.completion_tokens <= 8
        assert place.write(name).choices[0].text == found.choices[0].text
        texts[name] = found.choices[0].text
    assert len(set(texts.values())) > 1, "no adapter changes anything"


def counts_tokens(place: Place) -> None:
    for most in (1, 3):
        found = place.write(place.adapters[0], max_tokens=most, extra_body={"ignore_eos": True})
        assert found.usage.completion_tokens == most
        assert found.usage.total_tokens == most + found.usage.prompt_tokens
        assert found.choices[0].finish_reason == "length"


def chats(place: Place) -> None:
    for name in (place.base, place.adapters[0]):
        found = place.chat(name)
        assert found.choices[0].message.role == "assistant"
        assert isinstance(found.choices[0].message.content, str)
        assert found.model == name


def streams_what_it_says_whole(place: Place) -> None:
    name = place.adapters[0]
    parts = place.write(name, stream=True)
    assert "".join(part.choices[0].text for part in parts) == place.write(name).choices[0].text
    chunks = place.chat(name, stream=True, stream_options={"include_usage": True})
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == place.chat(name).choices[0].message.content
    assert chunks[-1].usage is not None


def stops_before_a_text(place: Place) -> None:
    name = place.adapters[0]
    whole = place.write(name, max_tokens=12, extra_body={"ignore_eos": True}).choices[0].text
    words = whole.split()
    stop = words[len(words) // 2]
    found = place.write(name, max_tokens=12, stop=[stop], extra_body={"ignore_eos": True})
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == whole[: whole.index(stop)]


def tells_logprobs(place: Place) -> None:
    told = place.write(place.adapters[0], logprobs=2, extra_body={"ignore_eos": True})
    logprobs = told.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert all(value <= 0 for value in logprobs.token_logprobs)
    for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(top.values()) == pytest.approx(own, abs=1e-3)  # greedy: the likeliest
    content = place.chat(place.base, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in content)


def answers_404_for_an_unknown_model(place: Place) -> None:
    with pytest.raises(openai.NotFoundError):
        place.write("no-such-adapter")
    with pytest.raises(openai.NotFoundError):
        place.chat("no-such-adapter")


def refuses_what_is_no_request(place: Place) -> None:
    for wrong in ({"max_tokens": -1}, {"temperature": -1}):
        with pytest.raises(openai.BadRequestError):
            place.write(place.base, **wrong)


def loads_and_unloads(place: Place) -> None:
    """Load a folder of the store under one more name, by a path from the store."""
    name = place.adapters[0]
    body = {"lora_name": SPARE, "lora_path": name}
    assert httpx.post(f"{place.url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
    with place.client() as client:
        assert SPARE in [model.id for model in client.models.list()]
    assert place.write(SPARE).choices[0].text == place.write(name).choices[0].text
    body = {"lora_name": SPARE}
    gone = httpx.post(f"{place.url}/v1/unload_lora_adapter", json=body, timeout=60)
    assert gone.status_code == 200
    with pytest.raises(openai.NotFoundError):
        place.write(SPARE)


def refuses_to_load_nothing(place: Place) -> None:
    body = {"lora_name": SPARE, "lora_path": "nowhere-at-all"}
    assert httpx.post(f"{place.url}/v1/load_lora_adapter", json=body, timeout=60).status_code >= 400
    assert httpx.post(f"{place.url}/v1/unload_lora_adapter", json={"lora_name": SPARE}, timeout=60).status_code == 404


def keeps_adapters_apart(place: Place) -> None:
    """Many at once say what each says alone."""
    names = (place.base, *place.adapters)
    alone = {name: place.write(name).choices[0].text for name in names}

    async def ask() -> list[tuple[str, str]]:
        url = f"{place.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120) as client:
            found = await asyncio.gather(
                *(
                    client.completions.create(model=name, prompt=place.prompt, max_tokens=8, temperature=0)
                    for name in names * 3
                )
            )
            return [(one.model, one.choices[0].text) for one in found]

    for name, text in asyncio.run(ask()):
        assert text == alone[name], name


CHECKS: tuple[Callable[[Place], None], ...] = (
    lists_the_base_and_its_adapters,
    writes_greedily,
    counts_tokens,
    chats,
    streams_what_it_says_whole,
    stops_before_a_text,
    tells_logprobs,
    answers_404_for_an_unknown_model,
    refuses_what_is_no_request,
    loads_and_unloads,
    refuses_to_load_nothing,
    keeps_adapters_apart,
)


def tokens_of(place: Place, name: str, prompt: list[int], most: int) -> list[str]:
    """Return the tokens that a model generates greedily, as texts."""
    with place.client() as client:
        found = client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=most,
            temperature=0,
            logprobs=1,
            extra_body={"ignore_eos": True},  # vLLM lists the token that ends, loralab does not
        )
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.tokens is not None
    return list(found.choices[0].logprobs.tokens)
