"""An example to begin with: an input of the kind that an adapter was trained on, as a person would type it.

The record of a training holds the tokens of a few validation inputs. What the template put around
each is taken off again.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from loralab.adapters.record import sound
from loralab.models.kinds import CAUSAL, CLASSIFIER
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.request_builder import task_of
from loralab.tasks.encode import chat_ids, prompt_ids
from loralab.tasks.examples import Ids

Example = dict[str, str]  # "mode", of the page, and "text"
MARKS = ("good", "the")  # inputs that show what a template writes around any input


def example_of(record: Mapping[str, Any], entry: AdapterInfo, *, kind: str, tokenizer: Any) -> Example | None:
    """Return the first recorded input that can be typed; None if there is none.

    Args:
        record: the content of loralab.json.
        kind: of the base.
    """
    sample = sound(record).get("sample") or []
    if kind == CLASSIFIER:
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in sample]
        return _first("classes", texts)
    if kind != CAUSAL or entry.form == "pair-label":
        return None
    if entry.form == "text" or not tokenizer.chat_template:
        return _first("text", [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sample])
    classes = bool(entry.labels) and entry.form == "text-label"
    framed = [_framed(mark, entry if classes else None, tokenizer) for mark in MARKS]
    inner = [_inside(tuple(ids), *framed) for ids in sample]
    return _first("classes" if classes else "chat", [str(tokenizer.decode(ids)) for ids in inner if ids])


def _first(mode: str, texts: list[str]) -> Example | None:
    return next(({"mode": mode, "text": text} for text in texts if text.strip()), None)


def _framed(text: str, labelled: AdapterInfo | None, tokenizer: Any) -> Ids:
    """Return an input as the model sees it, with the question of an adapter that classifies."""
    if labelled is None:
        return chat_ids(tokenizer, text)
    return prompt_ids(task_of(labelled), {"text": text, "label": labelled.labels[0]}, tokenizer)


def _inside(ids: Ids, one: Ids, other: Ids) -> Ids:
    """Return what stands where two inputs differ; empty for several turns, or where the beginning was cut off."""
    before, after = _shared(one, other), _shared(one[::-1], other[::-1])[::-1]
    if ids[: len(before)] != before or ids[len(ids) - len(after) :] != after:
        return ()
    inner = ids[len(before) : len(ids) - len(after)]
    again = after[:1] and after[0] in inner  # the end of a turn
    return () if again else inner


def _shared(one: Ids, other: Ids) -> Ids:
    """Return the beginning that two have in common."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in pairs)
