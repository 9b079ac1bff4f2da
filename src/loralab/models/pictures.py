"""Pictures as a vision model wants them: resized, cropped, normalised.

`Pictures` stands where a text model has its tokenizer. Its settings are those of the model's
preprocessor_config.json, and are written back to one that transformers reads.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils import cached_file

from loralab import atomic
from loralab.errors import ConfigError, ModelError
from loralab.values import read_json

FILE = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BICUBIC = 3  # as Pillow and preprocessor_config.json number it
MAX_PIXEL = 255.0
USUAL_SIZE, LARGEST_SIDE = 224, 2048


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Conversion of a picture to a tensor of `channels` x `size` x `size`.

    `mean` and `std` are per channel, of values from 0 to 1. The class attributes answer what is
    asked of a tokenizer: there is no text, so nothing ends it and nothing is padded.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    pad_token_id: ClassVar[int] = 0
    eos_token: ClassVar[None] = None
    eos_token_id: ClassVar[None] = None
    chat_template: ClassVar[None] = None

    @property
    def channels(self) -> int:
        """Return 3 for colour, 1 for grey."""
        return len(self.mean)

    def pixels(self, picture: Any) -> Tensor:
        """Return a Pillow image, or uint8 of (H, W) or (H, W, 3), as float32 (channels, size, size).

        The shorter side is resized to `size` (bicubic), the middle is kept.
        """
        from PIL import Image

        image = Image.fromarray(picture) if hasattr(picture, "shape") else picture
        image = image.convert("RGB" if self.channels == 3 else "L")
        short = min(image.size)
        width, height = (max(self.size, round(side * self.size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        values = values.view(self.size, self.size, self.channels).permute(2, 0, 1) / MAX_PIXEL
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return ((values - mean) / std).contiguous()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        content = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / MAX_PIXEL,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }
        atomic.write_file(Path(folder) / FILE, json.dumps(content, indent=2) + "\n")


def read(name: str, source: str, config: Any, image_size: int | None = None) -> Pictures:
    """Return the settings of a model's own preprocessor_config.json, else those of ImageNet.

    Args:
        source: folder or hub id.
        config: the model's configuration.
        image_size: pixels of a side; None is the model's own.

    Raises:
        ModelError: the file is damaged.
        ConfigError: the size is not a multiple of the model's patches.
    """
    found = cached_file(source, FILE, _raise_exceptions_for_missing_entries=False)
    config = settings(config)
    channels = int(getattr(config, "num_channels", 3))
    usual = int(side(getattr(config, "image_size", None)) or USUAL_SIZE)
    pictures = Pictures(size=usual, mean=IMAGENET_MEAN[:channels], std=IMAGENET_STD[:channels])
    if found is not None:
        pictures = _from_file(name, Path(found), pictures)
    size = pictures.size if image_size is None else image_size
    _require_whole_patches(size, side(getattr(config, "patch_size", None)) or 1)
    return replace(pictures, size=size)


def settings(config: Any) -> Any:
    """Return the part of a configuration that is about pictures: a part of its own, or all of it."""
    return getattr(config, "vision_config", None) or config


def side(value: Any) -> int | None:
    """Return the pixels of a side, however a configuration writes them."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height")
    if isinstance(value, list | tuple):
        value = next(iter(value), None)
    return None if value is None else int(value)


def _from_file(name: str, file: Path, usual: Pictures) -> Pictures:
    try:
        content = read_json(file, ModelError)
        size = side(content.get("crop_size")) if content.get("do_center_crop") else None
        size = size or side(content.get("size")) or usual.size
        mean, std = (
            tuple(float(number) for number in content.get(key) or own)
            for key, own in (("image_mean", usual.mean), ("image_std", usual.std))
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(f"{name}: {FILE} cannot be read: {error}", code="unreadable", field="model") from None
    finite = all(map(math.isfinite, (*mean, *std)))
    if len(mean) != usual.channels or len(std) != usual.channels or not all(std) or not finite:
        raise ModelError(
            f"{name}: {FILE} must give {usual.channels} means and deviations above 0, found {mean} and {std}",
            code="invalid_config",
            field="image_mean",
        )
    return Pictures(size=size, mean=mean, std=std)


def _require_whole_patches(size: int, patch: int) -> None:
    if size > LARGEST_SIDE:
        raise ConfigError(
            f"image_size must be at most {LARGEST_SIDE}, got {size}", code="invalid_value", field="image_size"
        )
    if size >= 1 and size % patch == 0:
        return
    below, above = max(patch, size // patch * patch), max(patch, (size // patch + 1) * patch)
    good = f"{below} or {above}" if below != above else str(above)
    raise ConfigError(
        f"image_size must be a multiple of {patch}, got {size}; the nearest: {good}",
        code="invalid_value",
        field="image_size",
    )
