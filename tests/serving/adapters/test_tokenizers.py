"""Each adapter is asked with the chat template that it was trained with."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CHAT
from serving.conftest import World, write_adapter
from serving.served import listening

from loralab.adapters.methods import LoRA
from loralab.cli.vllm import say_differing
from loralab.errors import BaseMismatchWarning
from loralab.serving.opening import open_engine
from loralab.serving.request import Sampling
from loralab.serving.settings import ServeSettings
from loralab.serving.text_engine import TextEngine
from loralab.tasks.segments import opening

OWN = CHAT.replace("<s>assistant ", "Answer : ").replace("</s>", " .")
TURNS = [{"role": "user", "content": "good film"}]


@pytest.fixture(scope="module")
def mixed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the base's template, of their own, of none, and of one that is broken."""
    store = tmp_path_factory.mktemp("mixed")
    stored: dict[str, dict[str, Any]] = {
        "same": {"chat_template": CHAT, "eos_token": "</s>"},
        "silent": {},
        "own": {"chat_template": OWN, "eos_token": "."},
        "plain": {"chat_template": None},
        "broken": {"chat_template": "{% for %}"},
    }
    for seed, (name, tokenizer) in enumerate(stored.items()):
        write_adapter(world.base.model, LoRA(rank=2), store / name, seed, tokenizer=tokenizer)
    return store


@pytest.fixture
def engine(world: World, mixed: Path) -> Iterator[TextEngine]:
    settings = ServeSettings(precision="fp32", cache_memory="2MB")
    engine = open_engine(model=str(world.folder), store=mixed, settings=settings)
    yield engine
    engine.stop(drain=False)


@pytest.mark.parametrize(
    ("name", "template", "stops"),
    [("same", CHAT, {"</s>"}), ("silent", CHAT, {"</s>"}), ("own", OWN, {"."}), ("plain", None, {"</s>"})],
)
@pytest.mark.filterwarnings("ignore::loralab.errors.BaseMismatchWarning")
def test_a_chat_is_written_and_ended_as_in_training(
    engine: TextEngine, name: str, template: str | None, stops: set[str]
) -> None:
    tokenizer = engine.tokenizer(engine.store.entry(name))
    assert tokenizer.chat_template == template
    live = engine._builder.generation([5], engine.store.entry(name), Sampling())
    assert set(engine.base.tokenizer.convert_ids_to_tokens(sorted(live.stops))) >= stops
    assert engine.base.tokenizer.chat_template == CHAT


def test_what_differs_is_said_once_for_each_adapter(engine: TextEngine, mixed: Path) -> None:
    shutil.copytree(mixed / "own", mixed / "twin", dirs_exist_ok=True)
    entries = [engine.store.entry(name) for name in ("same", "silent", "own", "plain")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for entry in entries * 2:
            engine.tokenizer(entry)
        engine.tokenizer(None)
    said = [str(one.message) for one in caught if one.category is BaseMismatchWarning]
    assert len(said) == 3  # own: template and end; plain: template
    assert not any("same" in text or "silent" in text for text in said)


def test_vllm_which_asks_all_alike_names_those_that_learnt_otherwise(
    engine: TextEngine, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    say_differing(engine.store.entries(), str(world.folder), "base")
    said = capsys.readouterr().err
    assert [name in said for name in ("same", "silent", "own", "plain")] == [False] * 2 + [True] * 2


@pytest.mark.filterwarnings("ignore::loralab.errors.BaseMismatchWarning")
def test_over_http_each_adapter_gets_its_own_prompt(engine: TextEngine) -> None:
    engine.start()
    with listening(engine, None, None) as where:
        for name in ("same", "own", "plain"):
            body = {"model": name, "messages": TURNS, "max_tokens": 4, "temperature": 0}
            found = httpx.post(f"{where}/v1/chat/completions", json=body).json()
            ids = opening(engine.tokenizer(engine.store.entry(name)), TURNS)
            alone = engine.generate([ids], adapters=[name], sampling=Sampling(max_tokens=4, temperature=0))
            assert found["usage"]["prompt_tokens"] == len(ids)
            assert found["choices"][0]["message"]["content"] == alone[0].text
        body = {"model": "broken", "messages": TURNS, "max_tokens": 4}
        answer = httpx.post(f"{where}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
