"""Requests as they are built, before they run."""

from pathlib import Path
from types import SimpleNamespace

from serving.vocabularies import byte_level
from torch import nn

from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.request import Sampling
from loralab.serving.request_builder import RequestBuilder


def test_without_a_template_a_prompt_ends_in_white_space_as_in_training() -> None:
    tokenizer = byte_level()
    model = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(len(tokenizer), 1))
    base = Base(name="b", model=model, tokenizer=tokenizer, kind="causal-lm", source="b")
    entry = AdapterInfo(
        name="a",
        digest="d",
        method="LORA",
        rank=1,
        bytes=1,
        task=None,
        labels=(),
        metrics={},
        base=None,
        kind=None,
        prefix_tokens=0,
        loaded=False,
        pinned=False,
        path=Path(),
        form="prompt-completion",
    )
    builder = RequestBuilder(base, 512)
    for text, warned in (("the river", True), ("the river\n", False), ("the river ", False)):
        live = builder.generation(tokenizer(text)["input_ids"], entry, Sampling())
        assert bool(live.answer.warning) == warned, text
