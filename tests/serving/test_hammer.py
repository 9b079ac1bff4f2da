"""Thousands of requests while adapters are loaded, moved and taken away: no answer is another's."""

import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.conftest import World, write_adapter

from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import IA3, Bottleneck, LoRA, Prefix
from loralab.errors import AdapterNotFoundError, QueueFullError
from loralab.serving.request import Sampling
from loralab.serving.text_engine import TextEngine

REQUESTS, THREADS, NEW = 3000, 16, 5
METHODS = [
    LoRA(rank=1),
    LoRA(rank=17),
    LoRA(rank=4, dora=True),
    IA3(),
    Prefix(tokens=3, init_std=0.5),
    Bottleneck(width=3, init_std=0.3),
    LoRA(rank=2, target_modules=["lm_head"]),
    LoRA(rank=64, target_modules=["v_proj"]),
]
GREEDY = Sampling(max_tokens=NEW, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def versions(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve adapters of all kinds."""
    store = tmp_path_factory.mktemp("versions")
    for number in range(12):
        method = METHODS[number % len(METHODS)]
        write_adapter(world.base.model, method, store / f"v{number}", 200 + number)
    return store


@torch.no_grad()
def written(model: Any, prompt: list[int]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=10**6,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    return tuple(out[0, len(prompt) :].tolist())


class Hammer:
    """Asks, moves names, and compares every answer with that of the digest it names."""

    def __init__(self, engine: TextEngine, world: World, store: Path) -> None:
        self.engine = engine
        self.prompts = prompts()
        self.whole, self.cut, self.unknown = 0, 0, 0
        self.wrong: list[Any] = []
        self.over = threading.Event()
        self.expected: dict[tuple[str | None, int], tuple[int, ...]] = {}
        for name in (None, *(path.name for path in sorted(store.iterdir()))):
            model = world.solo(None)
            if name is not None:
                load_adapter(model, store / name)
            digest = None if name is None else engine.store.entry(name).digest
            for number, prompt in enumerate(self.prompts):
                self.expected[digest, number] = written(model, prompt)

    def move(self) -> None:
        """Load, move and take away names until it is over."""
        own = random.Random(2)
        while not self.over.is_set():
            name = f"name{own.randrange(5)}"
            with contextlib.suppress(AdapterNotFoundError, QueueFullError):
                if own.random() < 0.2:
                    self.engine.store.unload(name)
                else:
                    self.engine.store.load(name, f"v{own.randrange(12)}")

    def ask(self, seed: int) -> None:
        """One request, now and then given up."""
        own = random.Random(seed)
        number = own.randrange(len(self.prompts))
        name = own.choice([None, f"name{own.randrange(5)}", f"v{own.randrange(12)}"])
        try:
            answer = self.engine.submit(self.prompts[number], adapter=name, sampling=GREEDY)
        except AdapterNotFoundError:
            self.unknown += 1
            return
        if own.random() < 0.1:
            answer.cancel()
        found = answer.result()
        want = self.expected[answer.digest, number]
        if found.finished.reason == "length":
            self.whole += 1
        else:
            self.cut += 1
            want = want[: len(found.tokens)]
        if found.tokens != want:
            self.wrong.append((name, answer.digest, number, found.tokens, want))


def prompts() -> list[list[int]]:
    """Return some prompts that begin alike."""
    draw = random.Random(1)
    start = [draw.randrange(3, 90) for _ in range(40)]
    return [[*start[: draw.randint(1, 40)], draw.randrange(3, 90)] for _ in range(8)]


@pytest.mark.slow
def test_every_answer_is_that_of_the_digest_it_names(
    world: World, versions: Path, opened: Callable[..., TextEngine]
) -> None:
    engine = opened(versions, resident=4, max_batch=12, cache_memory="150KB", queue=10_000)
    hammer = Hammer(engine, world, versions)
    answers = hammer.expected.values()
    assert len(set(answers)) > len(answers) // 2  # or a mistake would not be noticed
    engine.start()
    mover = threading.Thread(target=hammer.move)
    mover.start()
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(hammer.ask, range(REQUESTS)))
    finally:
        hammer.over.set()
        mover.join()
    assert not hammer.wrong
    assert hammer.whole > REQUESTS // 2
    assert hammer.cut > 10
    assert engine.running == engine.waiting == 0
    assert not any(engine._users.values())
    assert engine.store.evictions > 20
    assert engine._scheduler is not None
    assert engine._scheduler.blocks.num_free == engine._scheduler.blocks.count
