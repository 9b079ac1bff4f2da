"""Tokenizers with and without a chat template, tasks from rows, tiny models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loralab.tasks.catalog import Task
from loralab.tasks.formats import Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = ["the film is good", "a bad film, was it not?", "  yes\n\nno", "12 + 30 = 42", "影評 很好"]


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs, as GPT-2 and SmolLM2 have them: any text, and tokens with a space."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")],
    )
    inner.train_from_iterator(LINES * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture
def chat_tokenizer(tiny_llama_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def plain_tokenizer(tiny_gpt2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_gpt2_folder)


@pytest.fixture
def llama(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture
def gpt2(tiny_gpt2_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2_folder).eval()


@pytest.fixture(scope="session")
def task_of() -> Callable[..., Task]:
    """A task whose three splits are the same rows."""

    def make(form: str, rows: Sequence[Row], **fields: Any) -> Task:
        splits = {name: list(rows) for name in ("train", "validation", "test")}
        if form in ("text-label", "pair-label"):
            labels = tuple(sorted({row["label"] for row in rows}))
            fields = {"labels": labels, "instruction": "good or bad"} | fields
        return Task(name="rows", format=form, splits=splits, **fields)

    return make
