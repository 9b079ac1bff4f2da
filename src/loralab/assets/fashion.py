"""Fashion-MNIST: 70,000 pictures of clothes, 28 x 28 grey levels, in four gzipped idx files.

Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747.
"""

import math
import shlex
from pathlib import Path

from loralab.assets.gzipped import read_gzip
from loralab.errors import DataError
from loralab.tasks.catalog import NamedTask, folders, register
from loralab.tasks.formats import Row
from loralab.tasks.pictures import from_levels
from loralab.tasks.read import DataTable

NAME = "fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # by Debian's package
PLACES = ("fashion-mnist", "usr/share/datasets/fashion-mnist")  # in a folder of assets
PARTS = {"train": "train", "test": "t10k"}
DIGESTS = {
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
MAX_BYTES = 48_000_000  # bytes; the pictures of train are 47,040,016
UNSIGNED_BYTE = 8  # how an idx file names its type


def locate() -> Path | None:
    """Return the folder of the four files: among the assets, or where Debian puts it."""
    places = [*(folder / place for folder in folders() for place in PLACES), INSTALLED]
    return next((p for p in places if all((p / name).is_file() for name in DIGESTS)), None)


def how_to_get() -> str:
    """Return the command that brings the files."""
    package, place = "dataset-fashion-mnist", shlex.quote(str(folders()[-1]))
    return (
        f"apt-get install {package}, or without root: apt-get download {package} && dpkg-deb -x {package}_*.deb {place}"
    )


def load(folder: Path) -> DataTable:
    """Return the rows of train and test as a table.

    Raises:
        DataError: a file is damaged, or another one.
    """
    splits = {split: _rows(folder, part) for split, part in PARTS.items()}
    return DataTable(source=NAME, format="image-label", splits=splits)


def _rows(folder: Path, part: str) -> list[Row]:
    import numpy

    images, labels = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
    shape, levels = read_idx(folder / images)
    _, numbers = read_idx(folder / labels)
    pictures = numpy.frombuffer(levels, dtype=numpy.uint8).reshape(shape)
    return [
        {"image": from_levels(picture, f"{images}, picture {n}"), "label": FASHION_CLASSES[number]}
        for n, (picture, number) in enumerate(zip(pictures, numbers, strict=True), start=1)
    ]


def read_idx(file: Path) -> tuple[tuple[int, ...], bytes]:
    """Return shape and content of a gzipped idx file of bytes.

    Raises:
        DataError: it cannot be read, or is not the file that its name says.
    """
    data = read_gzip(file, DIGESTS[file.name], MAX_BYTES)
    dimensions = data[3]
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if data[2] != UNSIGNED_BYTE or len(data) != start + math.prod(shape):
        raise DataError(f"{file} is not an idx file of bytes", code="damaged_file")
    return shape, data[start:]


register(
    NamedTask(
        name=NAME,
        description="70,000 pictures of clothes in ten classes, 28 x 28 grey levels (Zalando)",
        licence="MIT",
        rows=70000,
        locate=locate,
        load=load,
        get=how_to_get,
    )
)
