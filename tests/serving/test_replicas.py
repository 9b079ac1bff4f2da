"""Replicas on a cluster answer as one engine does, and keep to their adapters."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.conftest import World
from serving.talk import talk

from loralab.errors import ConfigError
from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Key
from loralab.serving.http.server import address, open_socket
from loralab.serving.replicas import ReplicaPlan, app, call_app, merged_outcome, model_in, running
from loralab.serving.settings import Limits, ServeSettings

pytestmark = [  # Ray leaves files and processes to the garbage collector
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in (
        "ResourceWarning",
        "DeprecationWarning",
        "FutureWarning",
        "UserWarning",
        "pytest.PytestUnraisableExceptionWarning",
        "pytest.PytestUnhandledThreadExceptionWarning",
    )
]
NAMES = ("lora", "dora", "houlsby", "prefix", "ia3", "wide")
FRESH = ("pfeiffer", "prompt", "head", "embedding")  # of no other test: nobody holds them yet
SETTINGS = ServeSettings(precision="fp32", cache_memory="2MB")


def body(name: str, number: int = 0, **more: Any) -> dict[str, Any]:
    prompt = [3 + (7 * number + k) % 80 for k in range(6)]
    return {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}


# -- without a cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name"), [(b'{"model": "a"}', "a"), (b"[]", ""), (b"{", ""), (b'{"model": 3}', ""), (b"", "")]
)
def test_the_model_of_a_body(content: bytes, name: str) -> None:
    assert model_in(content) == name


def test_quotas_that_replicas_would_count_alone_are_refused() -> None:
    key = Key(name="ci", sha256=b"0" * 32, requests_per_minute=3)
    with pytest.raises(ConfigError) as error:
        ReplicaPlan(model="m", store="s", keys=(key,))
    assert (error.value.code, error.value.field) == ("quota_with_replicas", "keys")


@pytest.mark.parametrize(
    ("args", "code"),
    [({"model": "m"}, "missing_argument"), ({"model": "m", "store": "s", "residents": 3}, "unknown_argument")],
)
def test_wrong_arguments_of_serve_run_are_refused(args: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as error:
        app(args)
    assert error.value.code == code


def said(status: int, code: str | None = None) -> list[Any]:
    """Return an answer as messages."""
    content = b"Success" if code is None else json.dumps({"error": {"code": code}}).encode()
    start = {"type": "http.response.start", "status": status, "headers": []}
    return [
        start,
        {"type": "http.response.body", "body": content[:3]},
        {"type": "http.response.body", "body": content[3:]},
    ]


@pytest.mark.parametrize(
    ("others", "status"),
    [
        ([], 200),
        ([said(200), said(200)], 200),
        ([said(200), said(404, "model_not_found")], 200),  # a shared store: it is gone already
        ([said(400, "name_taken"), said(200)], 200),
        ([said(400, "invalid_value"), said(200)], 400),
        ([said(404, "model_not_found"), said(500, "cannot_write"), said(429, "queue_full")], 500),
    ],
)
def test_replicas_that_find_a_change_done_do_not_refuse_it(others: list[Any], status: int) -> None:
    assert merged_outcome(said(200), others)[0]["status"] == status


def test_a_limit_that_only_our_own_server_keeps_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        ReplicaPlan(model="m", store="s", limits=Limits(connections=9))
    assert (error.value.code, error.value.field) == ("no_effect", "connections")


def test_giving_up_an_answer_disconnects_its_application() -> None:
    gone = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await receive()
            await receive()
        finally:
            gone.set()

    async def first() -> Any:
        messages = call_app(endless, {}, b"")
        start = await anext(messages)
        await messages.aclose()  # type: ignore[attr-defined]
        return start

    import asyncio

    assert asyncio.run(first())["status"] == 200
    assert gone.is_set()


# -- with one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def where(world: World) -> Iterator[str]:
    """Two replicas on this machine."""
    pytest.importorskip("ray")
    with open_socket("127.0.0.1", 0) as opened:
        found = address(opened)
    plan = ReplicaPlan(model=str(world.folder), store=str(world.store), settings=SETTINGS)
    with running(plan, 2, "local", "127.0.0.1", int(found.rpartition(":")[2])) as about:
        assert set(NAMES) <= set(about.adapters)
        yield found


def replica_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-loralab-replica"]


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.slow
def test_answers_are_those_of_one_engine(where: str, world: World, opened: Any) -> None:
    engine = opened()
    engine.start()
    asked_for = [body(name, n) for n in range(4) for name in (*NAMES, world.folder.name)]

    async def alone(client: httpx.AsyncClient) -> list[str]:
        return [text_of(await client.post("/v1/completions", json=one)) for one in asked_for]

    expected = talk(build_app(engine, keys=None), alone)
    with httpx.Client(base_url=where, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: text_of(client.post("/v1/completions", json=one)), asked_for))
    assert found == expected
    assert len(set(found)) > len(NAMES)


@pytest.mark.slow
def test_the_openai_client_and_its_streams(where: str, world: World) -> None:
    import openai

    with openai.OpenAI(base_url=where + "/v1", api_key="none") as client:
        names = [model.id for model in client.models.list()]
        assert set(NAMES) <= set(names)
        turns: Any = [{"role": "user", "content": "good film"}]
        whole = client.chat.completions.create(model="lora", messages=turns, max_tokens=8, temperature=0)
        chunks = client.chat.completions.create(model="lora", messages=turns, max_tokens=8, temperature=0, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="lorra", prompt="good")
    wrong = httpx.post(where + "/v1/completions", content=b"{", headers={"content-type": "text/x"})
    assert wrong.status_code == 415


@pytest.mark.slow
def test_an_adapter_keeps_to_its_replica(where: str) -> None:
    with httpx.Client(base_url=where, timeout=60) as client:
        homes = {}
        for name in FRESH:
            homes[name] = replica_of(client.post("/v1/completions", json=body(name)))
            time.sleep(1)  # until every door knows
        for number in range(5):
            for name in FRESH:
                answer = client.post("/v1/completions", json=body(name, number))
                assert replica_of(answer) == homes[name]
    assert len(set(homes.values())) == 2


@pytest.mark.slow
def test_names_change_on_all_replicas(where: str) -> None:
    load = {"lora_name": "again", "lora_path": "lora"}
    with httpx.Client(base_url=where, timeout=60) as client:
        answer = client.post("/v1/load_lora_adapter", json=load)
        assert answer.status_code == 200, answer.text
        lists = [client.get("/v1/models") for _ in range(12)]
        assert len({replica_of(one) for one in lists}) == 2
        assert all("again" in one.text for one in lists)
        assert client.post("/v1/load_lora_adapter", json={**load, "lora_path": "../x"}).is_error
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "again"})
        assert gone.status_code == 200
        assert all("again" not in client.get("/v1/models").text for _ in range(8))


@pytest.mark.slow
def test_a_replica_that_dies_leaves_no_request_without_an_answer(where: str) -> None:
    import ray

    asked_for = [body(name, n, max_tokens=60) for n in range(6) for name in NAMES]
    with httpx.Client(base_url=where, timeout=120) as client, ThreadPoolExecutor(12) as pool:
        expected = [text_of(client.post("/v1/completions", json=one)) for one in asked_for]
        futures = [pool.submit(client.post, "/v1/completions", json=one) for one in asked_for]
        names = ray.util.list_named_actors(all_namespaces=True)
        victim = next(n for n in names if "#Replica#" in n["name"])
        ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
        assert [text_of(future.result()) for future in futures] == expected
        deadline = time.monotonic() + 120
        while len({replica_of(client.get("/v1/models")) for _ in range(8)}) < 2:
            assert time.monotonic() < deadline
            time.sleep(1)


@pytest.mark.slow
def test_a_store_that_a_node_lacks_is_refused(world: World, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "loralab",
            "serve",
            "--model",
            world.folder,
            "--ray",
            "local",
            "--store",
            tmp_path / "none",
            "--port",
            "0",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.search("error: node .*: there is no store", done.stderr)
