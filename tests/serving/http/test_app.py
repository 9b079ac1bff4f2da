"""The HTTP interface: OpenAI's shapes, whole and streamed, for its own client and for others."""

import asyncio
import base64
import hashlib
from typing import Any

import httpx
import openai
import pytest
from serving import served
from serving.fakes import FakeEngine, FakeEntry, FakeStore, digest_of
from serving.served import Serve
from serving.talk import CHAT, TEXT, error_of, events, get, post, talk

from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Key, Keys

engine, serve = served.engine, served.serve
SECRET, NARROW = "a secret for everything", "a secret for sst alone"


def keys() -> Keys:
    def digest(secret: str) -> bytes:
        return hashlib.sha256(secret.encode()).digest()

    return Keys(
        [
            Key(name="all", sha256=digest(SECRET), admin=True),
            Key(
                name="narrow",
                sha256=digest(NARROW),
                adapters=("sst",),
                base=False,
                requests_per_minute=3,
                tokens_per_day=40,
            ),
        ]
    )


# -- the openai client ---------------------------------------------------------------------------


def test_the_openai_client_works_unchanged(engine: FakeEngine, serve: Serve) -> None:
    with openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "news", "sst"]
        assert client.models.retrieve("sst").id == "sst"
        chat = client.chat.completions.create(
            model="sst",
            messages=[{"role": "user", "content": "good film"}],
            max_tokens=3,
            logprobs=True,
            top_logprobs=2,
            seed=1,
            n=2,
            stop=["x"],
            presence_penalty=0,
        )
        assert [choice.message.content for choice in chat.choices] == ["sst 0 1"] * 2
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 6
        told = chat.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert told.content[0].top_logprobs[1].logprob == -9999.0
        text = client.completions.create(model="tiny", prompt=["good", "bad"], logprobs=1)
        assert [choice.text.split()[0] for choice in text.choices] == ["base", "base"]
        assert text.choices[0].finish_reason == "length"
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.text_offset is not None
        assert text.choices[0].logprobs.text_offset[:3] == [0, 4, 6]
        with pytest.raises(openai.NotFoundError) as error:
            client.completions.create(model="sstt", prompt="good")
        assert error.value.code == "model_not_found"


def test_the_openai_client_streams(engine: FakeEngine, serve: Serve) -> None:
    with openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model=digest_of("sst"),
            messages=[{"role": "user", "content": "good film"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "sst 0 1"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        parts = client.completions.create(model="tiny", prompt="good", max_tokens=3, stream=True)
        assert "".join(part.choices[0].text for part in parts) == "base 0 1"


def test_the_asynchronous_openai_client(engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine) + "/v1"

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=where, api_key="none") as client:
            found = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=name, messages=[{"role": "user", "content": "good"}], max_tokens=2
                    )
                    for name in ("sst", "news", "tiny") * 5
                )
            )
            return [one.choices[0].message.content for one in found]

    assert asyncio.run(ask()) == ["sst 0", "news 0", "base 0"] * 5


# -- what is asked and what comes back -----------------------------------------------------------


def test_every_answer_names_its_digest(engine: FakeEngine) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        response = post(engine, path, body)
        assert response.headers["x-loralab-digest"] == digest_of("sst")
        assert response.json()["adapter"] == {"name": "sst", "digest": digest_of("sst")}
        streamed = post(engine, path, {**body, "stream": True})
        assert streamed.headers["x-loralab-digest"] == digest_of("sst")
        assert all(e["adapter"]["digest"] == digest_of("sst") for e in events(streamed))
    of_base = post(engine, "/v1/completions", {**TEXT, "model": "tiny"})
    assert of_base.json()["adapter"] is None
    assert "x-loralab-digest" not in of_base.headers


def test_sampling_reaches_the_engine(engine: FakeEngine) -> None:
    more = {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 7, "stop": "x", "ignore_eos": True}
    assert post(engine, "/v1/completions", {**TEXT, **more, "n": 2}).status_code == 200
    sampling = [sampling for _, sampling in engine.asked]
    assert (sampling[0].temperature, sampling[0].top_p, sampling[0].top_k) == (0, 0.5, 3)
    assert [one.seed for one in sampling] == [7, 8]
    assert sampling[0].stop == ("x",)
    assert sampling[0].ignore_eos
    assert sampling[0].logprobs is None


def test_prompts_may_be_tokens(engine: FakeEngine) -> None:
    single = post(engine, "/v1/completions", {**TEXT, "prompt": [5, 6, 7]})
    assert single.json()["usage"]["prompt_tokens"] == 3
    several = post(engine, "/v1/completions", {**TEXT, "prompt": [[5, 6], [7]]})
    assert [ids for ids, _ in engine.asked] == [(5, 6, 7), (5, 6), (7,)]
    assert several.json()["usage"]["total_tokens"] == 3 + 8
    error = error_of(post(engine, "/v1/completions", {**TEXT, "prompt": [5, 100_000]}), 400)
    assert error["param"] == "prompt"


def test_a_chat_is_tokenised_as_in_training(engine: FakeEngine) -> None:
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Answer with one word"}]},
        {"role": "user", "content": "good film"},
        {"role": "assistant", "content": "positive", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "bad film"},
    ]
    assert post(engine, "/v1/chat/completions", {**CHAT, "messages": turns}).status_code == 200
    tokenizer = engine.base.tokenizer
    turns[0] = {"role": "system", "content": "Answer with one word"}
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert list(engine.asked[0][0]) == tokenizer(text)["input_ids"]


def test_a_chat_without_a_length_may_fill_the_context(engine: FakeEngine) -> None:
    body = {key: value for key, value in CHAT.items() if key != "max_tokens"}
    post(engine, "/v1/chat/completions", body)
    ids, sampling = engine.asked[0]
    assert len(ids) + sampling.max_tokens == engine.context


def test_classes(engine: FakeEngine) -> None:
    engine.base.kind = "sequence-classification"
    engine.store = FakeStore(FakeEntry(name="sst", digest=digest_of("sst"), labels=("bad", "good")))
    response = post(engine, "/v1/classify", {"model": "sst", "input": ["good", "fine"]})
    body = response.json()
    assert [one["index"] for one in body["data"]] == [0, 1]
    assert body["data"][0]["label"] == "good"
    assert body["data"][0]["probs"] == [0.25, 0.75]  # in the order of the classes
    assert body["data"][0]["probabilities"] == {"good": 0.75, "bad": 0.25}
    assert body["data"][0]["num_classes"] == 2
    assert body["adapter"]["digest"] == response.headers["x-loralab-digest"] == digest_of("sst")
    error = error_of(post(engine, "/v1/completions", TEXT), 400)
    assert "/v1/classify" in error["message"]


def test_pictures_arrive_as_files(engine: FakeEngine) -> None:
    engine.base.kind = "image-classification"
    seen: list[Any] = []
    classify = engine.classify
    engine.classify = lambda texts, adapter: (seen.extend(texts), classify(texts, adapter=adapter))[  # type: ignore[func-returns-value, method-assign]
        1
    ]
    code = base64.b64encode(b"picture").decode()
    for given in ({"image": code}, [{"image": f"data:image/png;base64,{code}"}]):
        assert post(engine, "/v1/classify", {"model": "sst", "input": given}).status_code == 200
    assert seen == [b"picture", b"picture"]
    error_of(post(engine, "/v1/classify", {"model": "sst", "input": {"image": "§"}}), 400)


PATHS = [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("options", [{"include_usage": True}, {}, {"include_usage": None}])
def test_every_chunk_tells_the_usage_so_far(
    path: str, body: dict[str, Any], options: dict[str, Any], engine: FakeEngine
) -> None:
    asked = {**options, "continuous_usage_stats": True}
    more = {"stream": True, "n": 2, "stream_options": asked}
    chunks = events(post(engine, path, {**body, **more}))
    usages = [chunk["usage"] for chunk in chunks]
    counts = [usage["completion_tokens"] for usage in usages]
    prompt = len(engine.asked[0][0])
    assert counts == sorted(counts) and set(counts) == set(range(counts[0], 9))
    assert counts[-1] == 8
    for usage in usages:
        assert usage["prompt_tokens"] == prompt
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
    assert chunks[-1]["choices"] == []
    assert usages[-1]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_usage_in_a_stream_is_told_as_it_was_asked_for(path: str, body: dict[str, Any], engine: FakeEngine) -> None:
    for options, expected in (
        (None, "none"),
        ({}, "none"),
        ({"continuous_usage_stats": False}, "none"),
        ({"include_usage": False, "continuous_usage_stats": True}, "none"),
        ({"include_usage": True}, "last"),
        ({"include_usage": True, "continuous_usage_stats": False}, "last"),
    ):
        asked = {**body, "stream": True, "stream_options": options}
        chunks = events(post(engine, path, asked))
        if expected == "none":
            assert not any("usage" in chunk for chunk in chunks)
        else:
            assert all(chunk["usage"] is None for chunk in chunks[:-1])
            assert chunks[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_warning_is_told_once(path: str, body: dict[str, Any], engine: FakeEngine) -> None:
    plain = post(engine, path, body)
    assert "warning" not in plain.json() and "x-loralab-warning" not in plain.headers
    engine.warning = "take care"
    whole = post(engine, path, {**body, "n": 2})
    assert whole.headers["x-loralab-warning"] == whole.json()["warning"] == "take care"
    streamed = post(engine, path, {**body, "n": 2, "stream": True})
    assert streamed.headers["x-loralab-warning"] == "take care"
    chunks = events(streamed)
    assert chunks[0]["warning"] == "take care"
    assert not any("warning" in chunk for chunk in chunks[1:])


# -- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/store", "/metrics"])
def test_without_a_key_nothing_is_told(path: str, engine: FakeEngine) -> None:
    for key in (None, "wrong", ""):
        response = get(engine, path, keys=keys(), key=key)
        error_of(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert get(engine, path, keys=keys(), key=SECRET).status_code == 200
    assert get(engine, "/health", keys=keys()).status_code == 200
    assert get(engine, "/", keys=keys()).status_code == 200


def test_a_narrow_key_sees_and_asks_its_own_adapters_only(engine: FakeEngine) -> None:
    mine = {"keys": keys(), "key": NARROW}
    assert [m["id"] for m in get(engine, "/v1/models", **mine).json()["data"]] == ["sst"]
    assert [a["name"] for a in get(engine, "/store", **mine).json()["adapters"]] == ["sst"]
    error_of(get(engine, "/metrics", **mine), 403)
    told = set()
    for model in ("news", "newz", "tiny", "tinz", digest_of("news"), digest_of("newz"), "base"):
        asked = [
            post(engine, "/v1/completions", {**TEXT, "model": model}, **mine),
            post(engine, "/v1/chat/completions", {**CHAT, "model": model}, **mine),
            post(engine, "/v1/classify", {"model": model, "input": "a"}, **mine),
            get(engine, f"/v1/models/{model}", **mine),
        ]
        for error in (error_of(one, 404) for one in asked):
            told.add((error["message"].replace(model, "*"), error["param"], error["code"]))
    assert len(told) == 1  # what is there and what is not are told in the same words
    assert "did you mean" not in str(told)
    assert post(engine, "/v1/completions", {**TEXT, "model": digest_of("sst")}, **mine).is_success
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        error_of(post(engine, path, {"lora_name": "sst"}, **mine), 403)
    assert post(engine, "/v1/completions", TEXT, **mine).status_code == 200


def test_quotas_are_kept_and_unused_tokens_given_back(engine: FakeEngine) -> None:
    own = keys()
    mine: dict[str, Any] = {"keys": own, "key": NARROW}
    narrow = own.find(NARROW)
    assert narrow is not None
    large = {**TEXT, "max_tokens": 50}
    assert "tokens a day" in error_of(post(engine, "/v1/completions", large, **mine), 429)["message"]
    assert own.used_today(narrow) == 0
    assert post(engine, "/v1/completions", TEXT, **mine).status_code == 200
    assert own.used_today(narrow) == 2 + 4
    engine.full = True
    error_of(post(engine, "/v1/completions", TEXT, **mine), 429)
    assert own.used_today(narrow) == 6
    engine.full = False
    assert post(engine, "/v1/completions", TEXT, **mine).status_code == 200
    response = post(engine, "/v1/completions", TEXT, **mine)
    assert error_of(response, 429)["code"] == "quota_exceeded"
    assert int(response.headers["retry-after"]) <= 61


# -- the store and the metrics -------------------------------------------------------------------


def test_adapters_come_and_go(engine: FakeEngine) -> None:
    body = {"lora_name": "new", "lora_path": "runs/new"}
    response = post(engine, "/v1/load_lora_adapter", body)
    assert response.text == "Success: LoRA adapter 'new' added successfully."
    assert response.headers["content-type"].startswith("text/plain")
    assert response.headers["x-loralab-digest"] == engine.store.entry("new").digest
    assert post(engine, "/v1/completions", {**TEXT, "model": "new"}).status_code == 200
    response = post(engine, "/v1/unload_lora_adapter", {"lora_name": "new"})
    assert response.text == "Success: LoRA adapter 'new' removed successfully."
    error_of(post(engine, "/v1/unload_lora_adapter", {"lora_name": "new"}), 404)
    outside = {"lora_name": "new", "lora_path": "../new"}
    assert error_of(post(engine, "/v1/load_lora_adapter", outside), 400)["param"] == "lora_path"
    for name in ("tiny", "base"):
        of_base = {"lora_name": name, "lora_path": "runs/new"}
        error = error_of(post(engine, "/v1/load_lora_adapter", of_base), 400)
        assert (error["param"], error["code"]) == ("lora_name", "reserved_name")
    gone = error_of(post(engine, "/v1/unload_lora_adapter", {"lora_name": "nobody"}), 404)
    assert gone["param"] == "lora_name"


def test_a_name_that_is_taken_moves_unless_it_is_not_to(engine: FakeEngine) -> None:
    load, body = "/v1/load_lora_adapter", {"lora_name": "sst", "lora_path": "runs/new"}
    before = engine.store.entry("sst").digest
    error = error_of(post(engine, load, {**body, "load_inplace": False}), 400)
    assert (error["param"], error["code"]) == ("lora_name", "name_taken")
    assert engine.store.entry("sst").digest == before
    for more in ({}, {"load_inplace": None}, {"load_inplace": True}):
        engine.store.load("sst", "sst")
        assert post(engine, load, {**body, **more}).status_code == 200
        assert engine.store.entry("sst").digest != before
    free = {**body, "lora_name": "free", "load_inplace": False}
    assert post(engine, load, free).status_code == 200
    assert error_of(post(engine, load, {**free, "load_inplace": 0}), 400)["param"] == "load_inplace"


def test_models_and_the_store_tell_what_is_there(engine: FakeEngine) -> None:
    base, _, sst = get(engine, "/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["object"]) == ("tiny", None, "model")
    assert (sst["id"], sst["parent"], sst["rank"]) == ("sst", "tiny", 8)
    assert sst["digest"] == digest_of("sst")
    again = get(engine, "/v1/models/sst").json()
    assert again == {**sst, "created": again["created"]}  # the start of another server
    assert base["capabilities"] == ["completions", "chat", "classify"]
    error_of(get(engine, "/v1/models/sts"), 404)
    store = get(engine, "/store").json()
    assert store["base"] == {"name": "tiny", "kind": "causal-lm"}
    assert store["engine"]["max_waiting"] == 2
    assert [a["name"] for a in store["adapters"]] == ["news", "sst"]
    assert store["adapters"][1]["metrics"] == {"accuracy": 0.89}
    assert store["adapters"][1]["score"] == sst["score"] == {"metric": "accuracy", "value": 0.89}
    assert store["adapters"][0]["score"] is None


def test_metrics_count_by_adapter(engine: FakeEngine) -> None:
    app = build_app(engine, keys=None)  # type: ignore[arg-type]

    async def ask(client: httpx.AsyncClient) -> str:
        for model in ("sst", "sst", "tiny"):
            await client.post("/v1/completions", json={**TEXT, "model": model})
        engine.stop()
        return (await client.get("/metrics")).text

    lines = talk(app, ask).splitlines()
    who = f'adapter="sst",digest="{digest_of("sst")[:12]}"'
    assert f'loralab_requests_total{{{who},reason="length"}} 2.0' in lines
    assert f"loralab_completion_tokens_total{{{who}}} 8.0" in lines
    assert 'loralab_prompt_tokens_total{adapter="base",digest=""} 2.0' in lines
    assert f"loralab_first_token_seconds_count{{{who}}} 2.0" in lines
    assert "loralab_evictions_total 3.0" in lines
    assert "loralab_running 0.0" in lines
    assert "loralab_adapters_loaded 1.0" in lines
    assert any(line.startswith("loralab_step_seconds_count") for line in lines)
