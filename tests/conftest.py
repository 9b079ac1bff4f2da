"""Tiny models with tokenizers, saved as folders: real formats, random weights, milliseconds."""

import gc
import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import PRELOADED, Subprocess
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loralab.artefacts import certificate
from loralab.studies import executor

pytest_plugins = ("registers",)
THREADS = os.environ.get("LORALAB_TEST_THREADS", "1")  # more spin, and starve what runs beside
torch.set_num_threads(int(THREADS))
os.environ["OMP_NUM_THREADS"] = THREADS  # of processes that tests start
for devices in (torch.cuda, torch.mtia, torch.xpu):  # each manual_seed() writes down the stack for one that may come
    devices.traceback = SimpleNamespace(**{**vars(traceback), "format_stack": list})

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = (  # noqa: SIM905  (a list of 30 short strings is not easier to read)
    "system user assistant good bad fine poor great awful film a b yes no is this the of what say "
    "positive negative review Classify text Answer with one . : , ?"
).split()


def tiny_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """Whole words and two-digit numbers; </s> ends a text and pads, as SmolLM2's end token does."""
    names = ["<unk>", "<s>", "</s>", *WORDS, *map(str, range(60))]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT if chat else None
    return fast


VOCABULARY = 3 + len(WORDS) + 60
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
Saver = Callable[[str, Any, bool], Path]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import the tests without a search for garbage, and keep what they import out of every later one."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """Fork what would be a fresh interpreter, for fixtures of every scope too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "subprocess", Subprocess())
        patch.setattr(executor, "PRELOADED", PRELOADED)
        yield


@pytest.fixture(autouse=True)
def interpreters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start interpreters in tests that are marked `interpreter`."""
    if "interpreter" in request.keywords:
        monkeypatch.setattr(certificate, "subprocess", subprocess)


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """Write a model and the tiny tokenizer to a folder."""

    def save(name: str, model: Any, chat: bool) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tiny_tokenizer(chat=chat).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_llama_folder(deep_llama_folder: Path) -> Path:
    """The Llama that most tests take; a folder of tests that are no matter of layers takes the flat one."""
    return deep_llama_folder


@pytest.fixture(scope="session")
def deep_llama_folder(save_tiny: Saver) -> Path:
    """Llama with grouped queries and a tied head, chat template, end token = padding."""
    return _save_llama(save_tiny, 2)


@pytest.fixture(scope="session")
def flat_llama_folder(save_tiny: Saver) -> Path:
    """The same of one layer, for whole runs: half of what they take."""
    return _save_llama(save_tiny, 1)


def _save_llama(save_tiny: Saver, layers: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SIZES, "num_hidden_layers": layers},
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_position_embeddings=512,
    )
    return save_tiny("llama", LlamaForCausalLM(config), True)


@pytest.fixture(scope="session")
def tiny_gpt2_folder(save_tiny: Saver) -> Path:
    """GPT-2 with its Conv1D layers, no chat template."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, bos_token_id=1, eos_token_id=2
    )
    return save_tiny("gpt2", GPT2LMHeadModel(config), False)


@pytest.fixture(scope="session")
def tiny_bert_folder(deep_bert_folder: Path) -> Path:
    """The encoder that most tests take, as with the Llama."""
    return deep_bert_folder


@pytest.fixture(scope="session")
def deep_bert_folder(save_tiny: Saver) -> Path:
    """A BERT encoder without a head."""
    return _save_bert(save_tiny, 2)


@pytest.fixture(scope="session")
def flat_bert_folder(save_tiny: Saver) -> Path:
    """The same of one layer."""
    return _save_bert(save_tiny, 1)


def _save_bert(save_tiny: Saver, layers: int) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": layers}, max_position_embeddings=128)
    return save_tiny("bert", BertModel(config), False)


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt-completion rows of unequal length, most of them in the training part."""
    words = ["good", "bad", "fine", "poor", "great", "awful"]
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = []
    for n in range(60):
        prompt = " ".join([str(n), *(words[(n + j) % 6] for j in range(1 + n % 5))])
        rows.append({"prompt": prompt, "completion": words[n % 6]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
