"""Whatever stands beside it, a request's answer is that of its adapter alone."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.conftest import KINDS, World, write_adapter

from loralab.adapters.methods import LoRA
from loralab.errors import AdapterNotFoundError, DataError, QueueFullError, RunError
from loralab.serving.request import Delta, Finished, Sampling
from loralab.serving.text_engine import TextEngine

NEW = 6
Open = Callable[..., TextEngine]
GREEDY = Sampling(max_tokens=NEW, temperature=0, ignore_eos=True)


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 90) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def alone(model: Any, prompt: Sequence[int], new: int = NEW) -> tuple[int, ...]:
    """Return the output of transformers' own generate."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=10**6,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def models(world: World) -> dict[str | None, Any]:
    """Return the base with each adapter alone."""
    return {name: world.solo(name) for name in (None, *KINDS)}


@pytest.fixture(scope="module")
def solo(models: Any) -> Callable[[str | None, Sequence[int]], tuple[int, ...]]:
    """Return the output of an adapter alone; computed once for each prompt."""
    known: dict[Any, tuple[int, ...]] = {}

    def answer(name: str | None, prompt: Sequence[int]) -> tuple[int, ...]:
        key = (name, tuple(prompt))
        if key not in known:
            known[key] = alone(models[name], prompt)
        return known[key]

    return answer


def test_the_adapters_can_be_told_apart(solo: Any) -> None:
    """Or these tests would not notice an answer of the wrong one."""
    asked = prompts(8, seed=5)
    answers = {name: tuple(solo(name, prompt) for prompt in asked) for name in (None, *KINDS)}
    same = [(a, b) for a, b in itertools.combinations(answers, 2) if answers[a] == answers[b]]
    assert not same


def test_a_batch_of_all_kinds(opened: Open, solo: Any) -> None:
    engine = opened()
    names = [None, *KINDS] * 3
    asked = prompts(len(names))
    found = engine.generate(asked, adapters=names, sampling=GREEDY)
    for name, prompt, own in zip(names, asked, found, strict=True):
        assert own.tokens == solo(name, prompt), name
        assert own.digest == (None if name is None else engine.store.entry(name).digest)
        assert own.finished.reason == "length"
        assert (own.finished.prompt_tokens, own.finished.completion_tokens) == (len(prompt), NEW)


@pytest.mark.parametrize(
    "settings",
    [{"step_tokens": 5}, {"max_batch": 2}, {"cache_memory": "80KB"}, {"resident": 2}],
    ids=["small chunks", "small batch", "small cache", "few places"],
)
def test_however_little_room_there_is(opened: Open, solo: Any, settings: dict[str, Any]) -> None:
    engine = opened(**settings)
    names = [None, *KINDS] * 2
    asked = prompts(len(names), seed=1)
    found = engine.generate(asked, adapters=names, sampling=GREEDY)
    assert [own.tokens for own in found] == [solo(*one) for one in zip(names, asked, strict=True)]


def test_a_beginning_is_read_once_for_each_adapter(opened: Open, solo: Any) -> None:
    engine, start = opened(), prompts(1, 20, seed=3)[0] * 5
    for round_ in range(2):
        for name in (None, "lora", "prefix", "wide"):
            asked = [*start[:64], 5 + round_]
            own = engine.generate([asked], adapters=[name], sampling=GREEDY)[0]
            assert own.tokens == solo(name, asked)
            assert bool(own.finished.cached_tokens) == bool(round_)


def test_a_hammer_of_requests_that_come_and_go(opened: Open, solo: Any) -> None:
    engine = opened(max_batch=6, resident=3, cache_memory="200KB")
    engine.start()
    draw, jobs = random.Random(7), []
    pool = prompts(12, seed=8)
    for _ in range(150):
        jobs.append((draw.choice([None, *KINDS]), draw.choice(pool), draw.random() < 0.2))

    def ask(job: tuple[str | None, list[int], bool]) -> None:
        name, prompt, gives_up = job
        answer = engine.submit(prompt, adapter=name, sampling=GREEDY)
        if gives_up:
            time.sleep(random.random() / 100)
            answer.cancel()
        own = answer.result()
        if own.finished.reason == "cancelled":
            assert gives_up
            assert own.tokens == solo(name, prompt)[: len(own.tokens)]
        else:
            assert own.tokens == solo(name, prompt)

    for name in (None, *KINDS):
        for prompt in pool:
            solo(name, prompt)
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(ask, jobs))
    assert engine.running == engine.waiting == 0
    engine.stop()


def test_a_name_that_moves_leaves_those_alone_that_have_begun(world: World, opened: Open, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(world.base.model, LoRA(rank=2 + seed), tmp_path / name, 50 + seed)
    engine = opened(tmp_path)
    engine.store.load("alias", "one")
    prompt = prompts(1)[0]
    long = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    expected = engine.generate([prompt] * 2, adapters=["one", "two"], sampling=long)
    assert expected[0].tokens != expected[1].tokens
    answer = engine.submit(prompt, adapter="alias", sampling=long)
    engine._load_some()
    for _ in range(5):
        engine.step()
    engine.store.load("alias", "two")
    later = engine.submit(prompt, adapter="alias", sampling=long)
    engine.run_until_idle()
    assert answer.result().tokens == expected[0].tokens
    assert later.result().tokens == expected[1].tokens
    assert answer.digest != later.digest


def test_adapters_leave_the_model_when_the_store_lets_go_of_them(opened: Open) -> None:
    engine = opened(resident=2)
    for name in [*KINDS, *KINDS]:
        engine.generate([[5, 6]], adapters=[name], sampling=GREEDY)
    assert len(engine._users) <= 3
    assert all(users == 0 for users in engine._users.values())


def test_the_time_of_every_load_is_told(opened: Open) -> None:
    """Not of an adapter that is in memory, nor of the base."""
    engine, told = opened(resident=1), []
    engine.observe = told.append
    for name in ("lora", "lora", None, "dora", "lora"):
        engine.generate([[5, 6]], adapters=[name], sampling=GREEDY)
    seconds = [event["seconds"] for event in told if event["kind"] == "loaded"]
    assert len(seconds) == engine.store.loads == 3
    assert min(seconds) > 0


def test_stops_texts_and_seeds(world: World, opened: Open) -> None:
    engine, prompt = opened(), [7, 8, 9]
    whole = engine.generate([prompt], adapters=["lora"], sampling=GREEDY)[0]
    word = whole.text.split()[2]
    stopped = engine.generate(
        [prompt], adapters=["lora"], sampling=Sampling(max_tokens=NEW, temperature=0, ignore_eos=True, stop=(word,))
    )[0]
    assert stopped.finished.reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(word)]
    drawn = Sampling(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
    first = engine.generate([prompt], adapters=["lora"], sampling=drawn)[0]
    crowd = engine.generate([prompt] * 4, adapters=["houlsby", "lora", None, "lora"], sampling=drawn)
    assert crowd[1].tokens == crowd[3].tokens == first.tokens != crowd[0].tokens


def test_the_end_of_the_answer_ends_it(world: World, opened: Open) -> None:
    """The end-of-text token is not part of the answer, and counts."""
    engine = opened()
    free = Sampling(max_tokens=200, temperature=1.5, seed=1)
    found = engine.generate(prompts(12), adapters=[None] * 12, sampling=free)
    ended = [own for own in found if own.finished.reason == "stop"]
    assert ended
    for own in ended:
        assert 2 not in own.tokens
        assert own.finished.completion_tokens == len(own.tokens) + 1


def test_log_probabilities_are_those_of_the_model(world: World, opened: Open) -> None:
    engine, prompt = opened(), [7, 8, 9]
    sampling = Sampling(max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
    own = engine.generate([prompt], adapters=["dora"], sampling=sampling)[0]
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *own.tokens]])
        expected = world.solo("dora")(input_ids=ids).logits[0].log_softmax(dim=-1)
    for place, chosen in enumerate(own.logprobs):
        row = expected[len(prompt) - 1 + place]
        assert chosen.token == own.tokens[place]
        assert chosen.logprob == pytest.approx(float(row[chosen.token]), abs=1e-3)
        assert [one.token for one in chosen.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"step_tokens": 5}, {"cache_memory": "80KB", "max_batch": 3}, {"resident": 2}],
    ids=["all room", "small chunks", "small cache", "few places"],
)
@pytest.mark.parametrize("new", [0, 3])
def test_an_echo_explains_the_prompt(
    world: World, opened: Open, models: Any, new: int, settings: dict[str, Any]
) -> None:
    """Beside others, in pieces, and where the cache knows the prompt already."""
    engine = opened(**settings)
    names = [None, *KINDS] * 2
    asked = prompts(len(KINDS) + 1, longest=40, seed=11) * 2
    echo = Sampling(max_tokens=new, temperature=0, ignore_eos=True, echo=True, logprobs=2)
    plain = engine.generate(asked, adapters=names, sampling=GREEDY)
    answers = [
        engine.submit(prompt, adapter=name, sampling=sampling)
        for name, prompt in zip(names, asked, strict=True)
        for sampling in (echo, GREEDY)
    ]
    engine.run_until_idle()
    found = [answer.result() for answer in answers]
    assert [own.tokens for own in found[1::2]] == [own.tokens for own in plain]
    for name, prompt, own, whole in zip(names, asked, found[::2], plain, strict=True):
        assert own.tokens == whole.tokens[:new]
        assert own.finished.reason == "length"
        assert (own.finished.prompt_tokens, own.finished.completion_tokens) == (len(prompt), new)
        ids = [*prompt, *own.tokens]
        assert [one.token for one in own.logprobs] == ids
        with torch.no_grad():
            expected = models[name](input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        assert own.logprobs[0].logprob is None
        for place, one in enumerate(own.logprobs[1:]):
            assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-3)
            assert [top.token for top in one.top] == expected[place].topk(2).indices.tolist()
        assert own.text == "".join(one.text for one in own.logprobs)
        written = [*prompt, *(token for token in own.tokens if token > 2)]  # no special ones
        assert own.text == world.base.tokenizer.decode(written)


def test_an_echo_without_log_probabilities_is_the_text(world: World, opened: Open) -> None:
    engine, prompt = opened(), [1, 7, 8, 9]
    for new in (0, 4):
        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True, echo=True)
        own = engine.generate([prompt], adapters=["lora"], sampling=sampling)[0]
        assert own.logprobs == ()
        assert own.text == world.base.tokenizer.decode([*prompt[1:], *own.tokens])
        assert len(own.tokens) == new


def test_pieces_are_the_whole(opened: Open) -> None:
    engine = opened()
    answer = engine.submit([4, 5, 6], adapter="lora", sampling=GREEDY)
    engine.run_until_idle()
    events = list(answer)
    pieces = [event for event in events if isinstance(event, Delta)]
    assert isinstance(events[-1], Finished)
    assert sum(len(piece.tokens) for piece in pieces) == NEW
    assert len(pieces) > 1


def test_what_is_wrong_is_said_at_once(opened: Open) -> None:
    engine = opened(queue=1, max_batch=1)
    for adapter, prompt, error, code, field in (
        ("lorra", [5], AdapterNotFoundError, "unknown_adapter", "name"),
        (None, [], DataError, "invalid_value", "prompt"),
        (None, [5, 10_000], DataError, "invalid_value", "prompt"),
        (None, [5] * 600, DataError, "context_length_exceeded", "prompt"),
        ("prefix", [5] * 502, DataError, "context_length_exceeded", "prompt"),
    ):
        with pytest.raises(error) as wrong:
            engine.submit(prompt, adapter=adapter, sampling=GREEDY)
        assert (wrong.value.code, wrong.value.field) == (code, field)
    answers = [engine.submit([5], adapter="lora", sampling=GREEDY) for _ in range(2)]
    with pytest.raises(QueueFullError) as raised:
        engine.submit([5], adapter=None, sampling=GREEDY)
    assert raised.value.code == "queue_full"
    engine.run_until_idle()
    assert all(answer.result().tokens for answer in answers)


def test_what_dies_dies_alone(opened: Open, solo: Any, monkeypatch: Any) -> None:
    engine = opened()
    ways = engine._runner
    healthy = ways.logits

    def fragile(works: Any) -> Any:
        if any(99 in work.sequence.tokens for work in works):
            raise RuntimeError("out of something")
        return healthy(works)

    monkeypatch.setattr(ways, "logits", fragile)
    asked = [[5, 6], [7, 88, 8], [9]]
    bad = engine.submit([3, 4], adapter="lora", sampling=GREEDY)
    bad_row = engine._ready[0].sequences[0] if engine._ready else engine._arrived[0].sequences[0]
    bad_row.tokens.append(99)
    good = [engine.submit(prompt, adapter="lora", sampling=GREEDY) for prompt in asked]
    engine.run_until_idle()
    assert [own.result().tokens for own in good] == [solo("lora", prompt) for prompt in asked]
    with pytest.raises(RunError) as error:
        bad.result()
    assert error.value.code == "engine_error"


def test_an_adapter_that_was_damaged_since_fails_alone(world: World, opened: Open, tmp_path: Path) -> None:
    for seed, name in enumerate(("good", "bad")):
        write_adapter(world.base.model, LoRA(rank=2), tmp_path / name, 60 + seed)
    engine = opened(tmp_path)
    bad = engine.submit([5], adapter="bad", sampling=GREEDY)
    good = engine.submit([5], adapter="good", sampling=GREEDY)
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    engine.run_until_idle()
    assert good.result().tokens
    with pytest.raises(RunError) as error:
        bad.result()
    assert error.value.code == "engine_error"


def test_a_drain_finishes_what_was_asked_and_takes_nothing_more(opened: Open, solo: Any) -> None:
    engine = opened()
    engine.start()
    asked = prompts(8, seed=9)
    answers = [engine.submit(prompt, adapter="lora", sampling=GREEDY) for prompt in asked]
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    stopper.join(timeout=60)
    assert not stopper.is_alive()
    assert [own.result().tokens for own in answers] == [solo("lora", p) for p in asked]
    with pytest.raises(QueueFullError) as error:
        engine.submit([5], adapter=None, sampling=GREEDY)
    assert error.value.code == "closing"


def test_a_defect_leaves_nobody_waiting(opened: Open, monkeypatch: Any) -> None:
    engine = opened()

    def broken() -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(engine._scheduler, "plan", broken)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    answer = engine.submit([5], adapter=None, sampling=GREEDY)
    engine.start()
    with pytest.raises(RunError) as error:
        answer.result()
    assert error.value.code == "engine_error"
    assert not engine.healthy
    with pytest.raises(QueueFullError):
        engine.submit([5], adapter=None, sampling=GREEDY)


def test_a_prompt_unlike_those_of_training_is_named(world: World, opened: Open, tmp_path: Path) -> None:
    """Rows of questions and answers are trained inside the chat template."""
    forms = {"asked": "prompt-completion", "chats": "messages", "plain": "text", "foreign": None}
    for seed, (name, form) in enumerate(forms.items()):
        record = {"task": {"name": name, "format": form}} if form else {}
        write_adapter(world.base.model, LoRA(rank=2), tmp_path / name, 70 + seed, **record)
    engine, tokenizer = opened(tmp_path), world.base.tokenizer
    bare = tokenizer("good film")["input_ids"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "good film"}], add_generation_prompt=True, tokenize=False
    )
    told = {
        (name, number): bool(engine.submit(prompt, adapter=name, sampling=GREEDY).warning)
        for name in (*forms, None)
        for number, prompt in enumerate((bare, tokenizer(chat)["input_ids"], bare[:1]))
    }
    assert {key for key, warned in told.items() if warned} == {
        (name, number) for name in ("asked", "chats") for number in (0, 2)
    }
