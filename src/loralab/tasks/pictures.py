"""Pictures as rows hold them: known by their content's digest, decoded when a batch is made."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.errors import DataError, join_limited
from loralab.values import read_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
ARCHIVED = "__MACOSX"  # a folder that macOS puts beside what it archives
MAX_FILE_BYTES = 1 << 28  # bytes of a file
MAX_PIXELS = 89_478_485  # as many as Pillow takes without a warning
MAX_ASPECT_RATIO = 50  # the shorter side is brought to the model's size, and the longer one with it
CHECKED_SIZE = (32, 32)  # pixels; the smallest scale that JPEG offers is enough to read it whole


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture that is not decoded yet. Two are equal if their content is.

    `source` is a file, an encoded picture, or (height, width) uint8 of grey levels; `origin` says
    where it came from, for readers.
    """

    digest: str
    source: Any = field(compare=False, repr=False)
    origin: str = field(compare=False)

    def __str__(self) -> str:
        return f"picture {self.digest}"

    def open(self) -> Any:
        """Return the decoded Pillow image, upright, in RGB or grey levels.

        Raises:
            DataError: it cannot be read.
        """
        return _decoded(self.source, self.origin)


def from_file(file: Path, place: str = "") -> PictureFile:
    """Return a picture in a file, read once to see that it is whole.

    Raises:
        DataError: it is not there, or not a whole picture; `place` is where it is named.
    """
    origin = f"{place}: {file}" if place else str(file)
    try:
        data = read_bytes(file, DataError, MAX_FILE_BYTES)
    except DataError as error:
        said = f"{place}: {error}" if place else str(error)
        raise DataError(said, code="cannot_read", field="image") from None
    _require_whole(data, origin)
    return PictureFile(hashlib.sha256(data).hexdigest(), file, str(file))


def from_bytes(data: bytes, origin: str) -> PictureFile:
    """Return a picture that is stored in a row.

    Raises:
        DataError: it is not a whole picture.
    """
    _require_whole(data, origin)
    return PictureFile(hashlib.sha256(data).hexdigest(), data, origin)


def from_levels(levels: Any, origin: str) -> PictureFile:
    """Return a picture of (height, width) uint8 grey levels."""
    size = "x".join(map(str, levels.shape))
    digest = hashlib.sha256(size.encode() + levels.tobytes()).hexdigest()
    return PictureFile(digest, levels, origin)


def folder_of_pictures(folder: Path, splits: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split of a folder; none if no folder in it holds pictures.

    A sub-folder is a class. Where sub-folders are named as `splits` are and hold folders
    themselves, each is a split, and the folders in it are the classes.

    Raises:
        DataError: a picture cannot be read, or belongs to no class, or no split where there are.
    """
    inside = _sub_folders(folder)
    if not any(_pictures_in(place) for place in inside):
        return {}
    named = [place for place in inside if place.name.lower() in splits and _sub_folders(place)]
    if not named:
        return {"train": _classes(folder)}
    others = [place.name for place in inside if place not in named and _pictures_in(place)]
    others += sorted(file.name for file in folder.iterdir() if _is_picture(file))
    if others:
        raise DataError(
            f"{folder} has folders of a split ({join_limited(place.name for place in named)}), and beside "
            f"them pictures that are of none ({join_limited(others)}); move them away, or into a split",
            code="splits_and_classes",
            field=others[0],
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for place in named:
        split = splits[place.name.lower()]
        if split in found:
            raise DataError(
                f"{folder} has two {split} folders; one of them is {place.name}", code="two_files", field=split
            )
        found[split] = _classes(place)
    if "train" not in found:
        raise DataError(f"{folder} holds no train folder, only {', '.join(found)}", code="no_train")
    return found


def other_files(folder: Path) -> list[str]:
    """Return the files beside the pictures that are not read, and the folders without any picture."""
    found = [
        str(place.relative_to(folder))
        for place in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in place.relative_to(folder).parts)
        and not place.name.lower().startswith(("readme", "licen"))
        and place.is_file()
        and not _is_picture(place)
    ]
    return found + [f"{place.name}/ (no picture in it)" for place in _sub_folders(folder) if not _pictures_in(place)]


def _classes(folder: Path) -> list[dict[str, Any]]:
    loose = sorted(file.name for file in folder.iterdir() if _is_picture(file))
    if loose:
        raise DataError(
            f"{folder / loose[0]} is in no folder of a class, and has no label", code="pictures_without_class"
        )
    return [
        {"image": from_file(file), "label": place.name}
        for place in _sub_folders(folder)
        for file in _pictures_in(place)
    ]


def _sub_folders(folder: Path) -> list[Path]:
    places = (place for place in folder.iterdir() if place.is_dir())
    return sorted(place for place in places if not place.name.startswith((".", ARCHIVED)))


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_picture(file))


def _is_picture(file: Path) -> bool:
    named = file.suffix.lower() in PICTURES and not file.name.startswith(".")
    return named and file.is_file()


def _require_whole(data: bytes, origin: str) -> None:
    """Decode it once, JPEG at an eighth of its size: a check of its header sees no lost end."""
    _decoded(data, origin, draft=True)


def _decoded(source: Any, origin: str, *, draft: bool = False) -> Any:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise DataError(
            "pictures need the package pillow: pip install 'loralab[vision]'", code="needs_pillow"
        ) from None
    if hasattr(source, "shape"):
        return Image.fromarray(source)
    try:
        encoded = io.BytesIO(source) if isinstance(source, bytes) else source
        # Pillow knows some forty formats more, one of which it gives to Ghostscript to run
        with Image.open(encoded, formats=FORMATS) as image:
            _require_size(image.size, origin)
            if draft:
                image.draft("RGB", CHECKED_SIZE)
                image.load()
                return None
            return _plain(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:  # whose own text is an address in memory
        raise DataError(
            f"{origin} is not a picture that can be read ({', '.join(PICTURES)})", code="not_a_picture", field="image"
        ) from None
    except DataError:
        raise
    except Exception as error:  # its readers raise some ten unrelated kinds on damaged files
        raise DataError(f"{origin} is not a whole picture: {error}", code="damaged_file", field="image") from None


def _require_size(size: tuple[int, int], origin: str) -> None:
    """Refuse huge pictures before they are decoded: a kilobyte can describe gigabytes."""
    short, long = sorted(size)
    if short * long > MAX_PIXELS or long > MAX_ASPECT_RATIO * short:
        raise DataError(
            f"{origin} has {size[0]} x {size[1]} pixels; at most {MAX_PIXELS:,} are read, and "
            f"sides of at most 1 to {MAX_ASPECT_RATIO}",
            code="too_large",
            field="image",
        )


def _plain(image: Any) -> Any:
    """Return it in RGB, or in grey levels where it has no colours; transparency is dropped."""
    if image.mode.startswith("I"):  # 16 bits a level: the upper eight
        return image.convert("I").point(lambda level: level / 256).convert("L")
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
