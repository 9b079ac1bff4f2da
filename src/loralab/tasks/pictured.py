"""Pictures in conversations as tokens: what a processor makes of a text in which some stand.

A piece of text that is asked is given to the processor whole, with its pictures, so that it has the
ids of the model's own examples; nothing of it is learnt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from loralab.errors import DataError, ModelError
from loralab.tasks.examples import Ids
from loralab.tasks.pictures import PictureFile
from loralab.tasks.placed import MARK
from loralab.tasks.template import render

STAND_IN = "text-5b1e8d"  # for a message, where it is asked whether a template writes it
TYPES = ("token_type_ids", "mm_token_type_ids")  # which tokens are a picture's, as models call it
OF_TEXT = ("input_ids", "attention_mask", *TYPES)


@dataclass(frozen=True)
class Segment:
    """A run of tokens that carries loss, or does not.

    `text` is what they were before, of those that are asked; `types` tell the tokens of its `pictures`.
    """

    ids: Ids
    learnt: bool
    text: str = ""
    types: Ids = ()
    pictures: tuple[PictureFile, ...] = ()


def contents(template: str, chat: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return messages as a chat template reads them: lists of parts where there are pictures, or it needs them."""
    alone = reads_parts_alone(template)
    if not alone and not any(MARK in message["content"] for message in chat):
        return chat
    return [{**m, "content": _parts(m["content"])} if alone or MARK in m["content"] else m for m in chat]


def marks_in(chat: Sequence[Mapping[str, Any]]) -> int:
    """Return how many pictures stand in some messages."""
    return sum(message["content"].count(MARK) for message in chat)


def _parts(text: str) -> list[dict[str, str]]:
    texts = text.split(MARK)
    found = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for after in texts[1:]:
        found.append({"type": "image"})
        found += [{"type": "text", "text": after}] if after else []
    return found


@lru_cache(maxsize=16)
def reads_parts_alone(template: str) -> bool:
    """Return whether a chat template writes lists of parts, and no text that stands as it is."""
    whole = [{"role": "user", "content": STAND_IN}]
    return not _writes(template, whole) and _writes(template, [{**whole[0], "content": _parts(STAND_IN)}])


def _writes(template: str, chat: Sequence[Mapping[str, Any]]) -> bool:
    try:
        return STAND_IN in render(template, chat, prompt=False, tokens={"bos_token": "", "eos_token": ""})
    except Exception:  # whatever a template raises where it does not like a message
        return False


def processor_of(tokenizer: Any) -> Any:
    """Return the processor that a tokenizer belongs to.

    Raises:
        ModelError: there is none.
    """
    found = getattr(tokenizer, "processor", None)
    if found is None:
        why = getattr(tokenizer, "no_pictures", "the tokenizer belongs to no processor")
        raise ModelError(
            f"the rows hold pictures, and the model's processor is not here: {why}; map their column away "
            "(--map images=) to train without",
            code="no_processor",
            field="images",
        )
    return found


def with_pictures(
    tokenizer: Any, samples: Sequence[Sequence[Segment]], pictures: Sequence[PictureFile], asked: int
) -> list[list[Segment]]:
    """Return samples whose pictures are tokens.

    Args:
        pictures: those of the row, in the order of their places.
        asked: how many of them stand before the row's last answer.

    Raises:
        DataError: the chat template, or the row's text, has places for more of them, or for fewer.
    """
    processor = getattr(tokenizer, "processor", None)
    if not pictures and processor is None:
        return [list(segments) for segments in samples]
    token = processor_of(tokenizer).image_token
    found = []
    for number, segments in enumerate(samples):
        places = [_places(tokenizer, segment, token) for segment in segments]
        if sum(places) > asked or (number == len(samples) - 1 and sum(places) < asked):
            raise DataError(
                f"the chat template and the texts make {sum(places)} places for pictures ({token}), and the row has "
                f"{asked} pictures before its last answer",
                code="pictures_and_places",
                field="images",
            )
        given = iter(pictures)
        each = [tuple(next(given) for _ in range(count)) for count in places]
        pairs = zip(segments, each, strict=True)
        found.append([expanded(tokenizer, s, own) if own else s for s, own in pairs])
    return found


def _places(tokenizer: Any, segment: Segment, token: str) -> int:
    """Return how many pictures a piece has places for.

    Raises:
        DataError: it is an answer, or its text has the token of a picture that is none.
    """
    count = segment.text.count(token)
    strange = {*tokenizer.processor.image_token_ids, tokenizer.convert_tokens_to_ids(token)} & {*segment.ids}
    if strange and (segment.learnt or not count):
        written = tokenizer.convert_ids_to_tokens(strange.pop())
        raise DataError(
            f"a text holds {written!r}, with which the model's processor marks a picture; remove it, or write another "
            "word",
            code="picture_token_in_text",
            field="images",
        )
    return count


def expanded(tokenizer: Any, segment: Segment, pictures: Sequence[PictureFile]) -> Segment:
    """Return a piece with the tokens of its pictures."""
    made = processed(tokenizer, [segment.text], [[picture.open() for picture in pictures]])
    types = next((made[name][0] for name in TYPES if name in made), [0] * len(made["input_ids"][0]))
    return replace(segment, ids=tuple(made["input_ids"][0]), types=tuple(types), pictures=tuple(pictures))


def processed(tokenizer: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]], **options: Any) -> Any:
    """Return what a processor makes of some texts and the pictures of each.

    Raises:
        DataError: it refuses them.
    """
    try:
        return processor_of(tokenizer)(
            text=list(texts),
            images=[[_in_colour(one) for one in own] for own in pictures],
            add_special_tokens=False,
            return_mm_token_type_ids=True,
            **options,
        )
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:  # as processors do of a hundred models
        raise DataError(
            f"the model's processor refuses a picture: {type(error).__name__}: {error}",
            code="processor_refuses",
            field="images",
        ) from error


def _in_colour(image: Any) -> Any:
    return image.convert("RGB")


def inputs_of(tokenizer: Any, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return what a model reads of the pictures of some rows, beside their ids; nothing if there are none.

    Args:
        rows: the pictures of each row, decoded.
    """
    filled = [list(own) for own in rows if own]
    if not filled:
        return {}
    token = processor_of(tokenizer).image_token
    made = processed(tokenizer, [token * len(own) for own in filled], filled, padding=True, return_tensors="pt")
    return {name: value for name, value in made.items() if name not in OF_TEXT}
