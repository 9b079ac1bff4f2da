"""Many adapters beside one base: bytes stored, times to load, one batch for all of them."""

import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import CONFIG, RECORD, TENSORS
from loralab.adapters.load import load
from loralab.errors import ConfigError, LoralabError
from loralab.models.load import Base
from loralab.studies import timing, trained
from loralab.studies.fields import configured
from loralab.studies.measures.mixed_batch import Banked, swap
from loralab.studies.study import Arm, Record, Trial
from loralab.studies.subspace import together
from loralab.studies.trained import Tell, rows_of
from loralab.tasks.catalog import TASKS, Task
from loralab.tasks.encode import encode
from loralab.tasks.examples import Example
from loralab.tasks.forward import call
from loralab.tasks.kinds.registry import kind_named
from loralab.training.attached import with_head

MEASURE_TASK = "loralab.studies.measures.system:measure_task"
MEASURE_SYSTEM = "loralab.studies.measures.system:measure_system"
SIZES = (10, 20, 40)  # rows of a batch
WAYS = MIXED, TURN, ALONE = ("mixed", "in turn", "base alone")
REPEATS = (25, 9)  # thorough, quick
COMPARED = 8  # test rows of each task whose answers are compared
LOADS = 3
Stored = tuple[Path, Task]  # a trained adapter on disk, and the task that it answers
Request = tuple[int, Example]  # the adapter's number, and the row that it answers


def own_trial(trial: Trial, name: str) -> Trial:
    """Return the trial on the setup of a task of its own."""
    mapping = {} if name in TASKS else trial.setup.mapping
    return replace(trial, setup=replace(trial.setup, data=name, mapping=mapping))


def measure_task(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train an adapter on its own task; its score stands beside that of the commonest label."""
    return trained.measure(own_trial(trial, str(trial.arm.options["task"])), folder, tell)


def measure_system(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Load all adapters, answer mixed batches and adapter after adapter, compare and time."""
    stored = adapters_of(trial, folder, tell)
    if len(stored) < 2:
        raise ConfigError("a system needs at least two adapters, and fewer could be trained", code="too_few_adapters")
    task = stored[0][1]
    base, seconds = loaded(trial, task)
    adapters, expected, cold = one_after_the_other(trial, stored)
    asked = requests(stored, base)
    mixed = Banked(base.model, adapters)
    try:
        equality = compared(base, mixed, asked, expected)
        series, warm = timed(trial, task, base, mixed, asked, adapters)
    finally:
        mixed.remove()
    numbers = {
        "adapters": len(stored),
        "model_seconds": seconds,
        "cold_seconds": statistics.median(cold),
        "warm_seconds": warm,
        "model_bytes": 4 * sum(p.numel() for p in base.model.parameters()),  # in fp32, as the adapters are
        **equality,
        "adapter_bytes": statistics.fmean(folder_bytes(place) for place, _ in stored),
    }
    return trial.record(numbers=numbers, series=series)


def adapters_of(trial: Trial, folder: Path, tell: Tell) -> list[Stored]:
    """Return the adapters that the trials of the tasks left beside this one; what is missing is trained."""
    found: list[Stored] = []
    for arm in trial.arm.options["arms"]:
        one = replace(trial, arm=Arm(**arm), measure=MEASURE_TASK)
        name = str(one.arm.options["task"])
        place = folder.parent / one.digest / "run"
        own = own_trial(one, name)
        try:
            if not (place / TENSORS).is_file():
                place = folder / f"task-{len(found)}" / "run"
                trained.trained(own, place.parent, tell)
                trained.forget(place.parent, 0)
            found.append((place, rows_of(own.setup)))
        except LoralabError as error:
            tell({"kind": "note", "text": f"{name} is left out: {error}"})
    return found


def loaded(trial: Trial, task: Task) -> tuple[Base, float]:
    """Return the base model in fp32, ready to answer, and the seconds that loading it took."""
    base, seconds = timing.timed(lambda: trained.base_with(trial.setup, task))
    base.model.eval().requires_grad_(False)
    return base, seconds


def one_after_the_other(trial: Trial, stored: Sequence[Stored]) -> tuple[list[Adapter], list[Tensor], list[float]]:
    """Load every adapter as users do; return what was attached, its answers, and the seconds of each load."""
    adapters: list[Adapter] = []
    answers: list[Tensor] = []
    seconds: list[float] = []
    bases: dict[int, Base] = {}
    for place, task in stored:
        labels = len(task.labels)
        if labels not in bases:
            bases[labels] = loaded(trial, task)[0]
        base = bases[labels]
        for number in range(LOADS):
            adapter, taken = timing.timed(functools.partial(load, base.model, place))
            seconds.append(taken)
            if number < LOADS - 1:
                adapter.detach()
        base.model.eval()
        adapters.append(adapter)
        answers += outputs(base, [example for _, example in requests([(place, task)], base)])
        adapter.detach()
    return adapters, answers, seconds


def requests(stored: Sequence[Stored], base: Base) -> list[Request]:
    """Return the first test rows of every task, each with the number of its adapter."""
    found = []
    for number, (_, task) in enumerate(stored):
        rows = task.splits["test"][:COMPARED]
        encoded = encode(task, "test", base.tokenizer, kind=base.kind, max_length=512, rows=rows)
        found += [(number, example) for example in encoded.examples]
    return found


@torch.no_grad()
def outputs(base: Base, examples: Sequence[Example]) -> Tensor:
    """Return what decides each row's answer: the logits of its classes, or of its first token."""
    batch = together(base, examples)
    if not kind_named(base.kind).writes:
        return call(base.model, batch).float().cpu()  # an accelerator has finished then
    logits, _, rows = kind_named(base.kind).labelled(base.model, batch)
    first = torch.searchsorted(rows, torch.arange(len(examples), device=rows.device))
    return logits[first].float().cpu()


def compared(base: Base, mixed: Banked, asked: Sequence[Request], expected: Sequence[Tensor]) -> dict[str, float]:
    """Return how far the answers of mixed batches are from those of one adapter after the other."""
    order = list(range(len(asked)))
    random.Random(0).shuffle(order)
    furthest, largest, same = 0.0, 0.0, 0
    for begin in range(0, len(order), SIZES[-1]):
        group = sorted(order[begin : begin + SIZES[-1]], key=lambda i: asked[i][0])
        mixed.route([asked[i][0] for i in group])
        for i, found in zip(group, outputs(base, [asked[i][1] for i in group]), strict=True):
            own = found[: len(expected[i])]
            furthest = max(furthest, float((own - expected[i]).abs().max()))
            largest = max(largest, float(expected[i].abs().max()))
            same += int(own.argmax() == expected[i].argmax())
    mixed.route(None)
    return {"furthest": furthest, "largest": largest, "same": same / len(asked), "compared": len(asked)}


def timed(
    trial: Trial, task: Task, base: Base, mixed: Banked, asked: Sequence[Request], adapters: Sequence[Adapter]
) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of a batch in each of the ways, which take turns so that all meet the same machine."""
    own, _ = loaded(trial, task)
    method, _ = configured({**trial.setup.fields, **trial.arm.options["arms"][0]["fields"]})
    adapter = attach(own.model, with_head(method, own))
    own.model.eval()
    repeats = REPEATS[trial.setup.quick]
    every = interleaved(asked, len(adapters))
    # the rows of an adapter stand together
    batches = {size: sorted(every[:size], key=lambda one: one[0]) for size in SIZES if size <= len(every)}
    groups = {size: {n: [e for m, e in batch if m == n] for n, _ in batch} for size, batch in batches.items()}

    def answer(way: str, size: int) -> None:
        if way == TURN:
            for number, members in groups[size].items():
                swap(adapter, adapters[number])
                outputs(own, members)
        else:
            mixed.route([number for number, _ in batches[size]] if way == MIXED else None)
            outputs(base, [example for _, example in batches[size]])

    for way, size in itertools.product(WAYS, batches):  # the first time builds what the others find ready
        answer(way, size)
    seconds = timing.in_turns(
        WAYS, list(batches), lambda *ask: timing.timed(lambda: answer(*ask))[1], seconds=math.inf, most=repeats
    )
    swaps = [functools.partial(swap, adapter, one) for one in [*adapters] * max(1, repeats // 3)]
    warm = statistics.median(timing.timed(one)[1] for one in swaps)
    return {f"{way} {size}": own for (way, size), own in seconds.items()}, warm


def interleaved(asked: Sequence[Request], adapters: int) -> list[Request]:
    """Return one row for each adapter in turn, so that every batch meets as many as it can."""
    queues = [[a for a in asked if a[0] == number] for number in range(adapters)]
    rounds = itertools.zip_longest(*queues)
    return [a for members in rounds for a in members if a is not None]


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files of an adapter folder that a system needs."""
    files = (folder / name for name in (TENSORS, CONFIG, RECORD))
    return sum(file.stat().st_size for file in files if file.is_file())
