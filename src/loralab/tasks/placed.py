"""Pictures in the texts of rows: which there are, and where in the question each stands.

A text holds a mark where a picture stands, and the row holds the pictures under "images", in that
order. Pictures without a place of their own stand in front of the first question.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import DataError, format_value
from loralab.tasks.formats import PICTURED, Row, is_empty
from loralab.tasks.pictures import PictureFile, from_bytes, from_file

MARK = "\ufdd0"  # a code that no text may hold: it stands where a picture does
WRITTEN = "<image>"  # what LLaVA's rows, and others after them, write there
SOURCES = "images"  # of a message, while it is read: what its parts say of their pictures
PICTURE_PARTS = ("image", "image_url", "input_image")
IN_PARTS = ("image", "image_url", "bytes", "path", "url", "data", "base64")  # fields that may hold a picture
EMBEDDED = "data:image/"  # how the address of a picture begins that is one itself


def picture_in(place: str, value: Any, folder: Path) -> PictureFile:
    """Return a picture from a path, from bytes, or from a dict that has either, as Parquet files hold them.

    Raises:
        DataError: it is none of them, or not a picture that can be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes):
        return from_bytes(value, place)
    if isinstance(value, str) and value.startswith(EMBEDDED):
        return from_bytes(_decoded(place, value), place)
    if isinstance(value, str) and value.strip() and "://" not in value:
        return from_file(folder / value, place)
    raise DataError(
        f"{place}: 'image' must be the path of a picture or its bytes, found {format_value(value)}",
        code="not_a_picture",
        field="image",
    )


def pictures_of(place: str, row: Row, folder: Path) -> list[PictureFile]:
    """Return the pictures in the columns `image` and `images` of a row.

    Raises:
        DataError: both are filled, or one holds what is no picture.
    """
    filled = [column for column in PICTURED if not is_empty(row.get(column))]
    if len(filled) > 1:
        raise DataError(
            f"{place}: 'image' and 'images' are both filled; keep one", code="two_columns_of_pictures", field="images"
        )
    values = [row[column] for column in filled]
    listed = values[0] if values and isinstance(values[0], list) else values
    return [picture_in(place, value, folder) for value in listed]


def marked_parts(place: str, role: str, value: Any) -> tuple[Any, list[Any]]:
    """Return the content of a message with marks for its pictures, and what it says of each.

    Nothing is said (None) of a picture that the row holds in a column.

    Raises:
        DataError: a picture stands where none is asked about.
    """
    parts = value if isinstance(value, list) else []
    sources = [_source(part) for part in parts if _is_picture(part)]
    if not sources:
        return value, []
    if role not in ("user", "tool"):
        raise DataError(
            f"{place}: a picture in a message of role {role}; pictures are read in those of the user",
            code="picture_in_answer",
            field="content",
        )
    return [{"type": "text", "text": MARK} if _is_picture(part) else part for part in parts], sources


def placed_in_messages(
    place: str, messages: list[dict[str, Any]], pictures: list[PictureFile], folder: Path
) -> dict[str, list[PictureFile]]:
    """Return all pictures of a conversation in their order; the messages get marks where they stand.

    Raises:
        DataError: there are more of them than places, or fewer.
    """
    sources = [source for message in messages for source in message.pop(SOURCES, ())]
    free = sum(source is None for source in sources)
    if sources:
        if free != len(pictures):
            raise _uneven(place, free, "parts without a picture of their own", len(pictures))
        given = iter(pictures)
        found = [next(given) if source is None else picture_in(place, source, folder) for source in sources]
        return {"images": found}
    if not pictures:
        return {}
    asked = [message for message in messages if message["role"] == "user"]
    written = sum(message["content"].count(WRITTEN) for message in asked)
    if written not in (0, len(pictures)):
        raise _uneven(place, written, f"{WRITTEN} in the texts", len(pictures))
    for message in asked if written else asked[:1]:
        message["content"] = _marked(message["content"], 0 if written else len(pictures))
    if not asked:
        raise DataError(f"{place}: no message of the user is there for a picture", code="no_question", field="messages")
    return {"images": pictures}


def placed_in_text(place: str, values: Row, pictures: list[PictureFile]) -> Row:
    """Return a row's pictures, and its question with marks where they stand; nothing without pictures.

    Raises:
        DataError: its text has places for more pictures, or for fewer.
    """
    if not pictures:
        return {}
    texts = {column: values[column] for column in ("prompt", "instruction", "input") if column in values}
    written = sum(text.count(WRITTEN) for text in texts.values())
    if written not in (0, len(pictures)):
        raise _uneven(place, written, f"{WRITTEN} in the text", len(pictures))
    first = next(iter(texts))
    marked: Row = {c: _marked(text, len(pictures) if c == first and not written else 0) for c, text in texts.items()}
    return {**marked, "images": pictures}


def _marked(text: str, before: int) -> str:
    """Return a text with its places marked, or with some marks in front of it."""
    return MARK * before + text if before else text.replace(WRITTEN, MARK)


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PICTURE_PARTS


def _source(part: Mapping[str, Any]) -> Any:
    """Return what a part says of its picture; None if that is in a column of the row."""
    value = next((part[name] for name in IN_PARTS if not is_empty(part.get(name))), None)
    return value.get("url") if isinstance(value, Mapping) and "url" in value else value


def _decoded(place: str, address: str) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(address.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{place}: a picture's address is damaged: {error}", code="damaged_file", field="image"
        ) from None


def _uneven(place: str, places: int, what: str, pictures: int) -> DataError:
    return DataError(
        f"{place}: {places} {what}, and {pictures} pictures in the row; there must be as many",
        code="pictures_and_places",
        field="images",
    )
