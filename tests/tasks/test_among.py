"""Several processes that score together get the scores of one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoModelForTokenClassification as Tagger

from loralab.models.source import quiet
from loralab.tasks.batches import collate
from loralab.tasks.catalog import Task
from loralab.tasks.examples import Example
from loralab.tasks.forward import by_length
from loralab.tasks.score import Scores, evaluate

TEXTS = ["good film", "awful", "a poor poor film .", "fine", "bad bad bad", "great review", "a b"]
MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": Classifier,
    "token-classification": Tagger,
    "sentence-encoder": AutoModel,
}


class Threads:
    """Processes, as far as scores know them: what each gathers, all get."""

    def __init__(self, size: int) -> None:
        self.size, self.values = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def among(self, rank: int) -> "OneOf":
        return OneOf(self, rank)


class OneOf:
    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads, self.rank, self.size = threads, rank, threads.size

    def all_gather(self, value: Any) -> list[Any]:
        self._threads.values[self.rank] = value
        self._threads.barrier.wait()
        found = list(self._threads.values)
        self._threads.barrier.wait()
        return found


def rows_for(form: str) -> list[dict[str, Any]]:
    if form == "tokens-tags":
        words = [text.split() for text in TEXTS]
        return [{"tokens": own, "tags": (["O", "B-N"] * 3)[: len(own)]} for own in words]
    if form == "pair":
        return [{"text_a": t, "text_b": f"{n} {t}"} for n, t in enumerate(TEXTS)]
    if form == "prompt-completion":
        return [{"prompt": t, "completion": f"{t} yes"} for t in TEXTS]
    return [{"text": t, "label": ("yes", "no")[n % 2]} for n, t in enumerate(TEXTS)]


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("causal-lm", "prompt-completion"),
        ("causal-lm", "text-label"),
        ("sequence-classification", "text-label"),
        ("token-classification", "tokens-tags"),
        ("sentence-encoder", "pair"),
    ],
)
def test_scores_of_several_are_those_of_one(
    kind: str, form: str, size: int, tiny_llama_folder: Path, tiny_bert_folder: Path, task_of: Callable[..., Task]
) -> None:
    folder = tiny_llama_folder if kind == "causal-lm" else tiny_bert_folder
    more = {"labels": ("O", "B-N")} if form == "tokens-tags" else {}
    task = task_of(form, rows_for(form), **more)
    torch.manual_seed(0)
    with quiet():
        model = MODELS[kind].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def scored(among: OneOf | None) -> Scores:
        return evaluate(model, tokenizer, task, kind=kind, batch_size=2, among=among)

    alone, threads = scored(None), Threads(size)
    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(scored, map(threads.among, range(size))):
            assert found == alone


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_all_get_equally_many_batches_and_every_example_is_somebodys(size: int, tiny_bert_folder: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    ids = [tuple(range(5, 6 + n % 4)) for n in range(13)]
    examples = [Example(n, own, (0,)) for n, own in enumerate(ids)]
    kind = "sequence-classification"
    batches = [list(by_length(model, tokenizer, examples, kind, 2, Threads(size).among(rank))) for rank in range(size)]
    assert len({len(own) for own in batches}) == 1
    assert {i for own in batches for indices, _ in own for i in indices} == set(range(13))
    for indices, batch in batches[-1]:
        expected = collate([examples[i] for i in indices], pad_id=tokenizer.pad_token_id, kind=kind)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
