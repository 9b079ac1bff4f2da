"""Ten tasks from one archive: texts of four kinds, rated from -4 to 4 by people (VADER's data).

Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text" (ICWSM). Every text has the mean of its ratings, and the ratings themselves
(15 to 100 people). Texts within half a point of 0 have no sentiment to tell, and no strength.
"""

import ast
import gzip
import hashlib
import io
import statistics
import tarfile
import zipfile
from functools import partial
from pathlib import Path

from loralab.errors import DataError
from loralab.packages import Package
from loralab.tasks.catalog import NamedTask, folders, register, writable_folder
from loralab.tasks.formats import Row
from loralab.tasks.read import DataTable

ARCHIVE = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
PACKAGE = Package(
    name="vaderSentiment",
    version="0.5",
    sha256=SHA256,
    size=2_448_964,
    licence="MIT; texts from Rotten Tomatoes, Twitter, Amazon, the New York Times",
    archive=ARCHIVE,
    folder=writable_folder,
)
INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL = 0.5
MARK = "\xef\xbb\xbf"  # of the order of bytes, at the start of a file, read as Latin-1
SOURCES = {  # task -> file, label of the source
    "movie-reviews": ("movieReviewSnippets", "film"),
    "tweets": ("tweets", "tweet"),
    "amazon-reviews": ("amazonReviewSnippets", "product"),
    "nyt-editorials": ("nytEditorialSnippets", "newspaper"),
}
TEXTS = {  # of a source: what they are, where from, how many have a feeling, what one is
    "movie-reviews": ("film review snippets", "Rotten Tomatoes", 10041, "film review"),
    "tweets": ("tweets", "Twitter", 3362, "tweet"),
    "amazon-reviews": ("sentences of product reviews", "Amazon", 2935, "sentence of a product review"),
    "nyt-editorials": ("sentences of newspaper editorials", "the New York Times", 2751, "sentence of a newspaper"),
}
STRENGTH = "-strength"
ORIGIN, AGREEMENT = "text-source", "rater-agreement"
SENTIMENT = "Is this {} positive or negative? Answer with one word."
FORCE = "Is the feeling in this {} strong or mild? Answer with one word."


def locate() -> Path | None:
    """Return the archive in the first folder that has it."""
    return next((f / ARCHIVE for f in folders() if (f / ARCHIVE).is_file()), None)


def how_to_get(task: str) -> str:
    """Return the command that brings the archive."""
    return f"loralab assets install {task}"


def load(task: str, path: Path) -> DataTable:
    """Return one of the ten tasks as a table.

    Raises:
        DataError: the archive cannot be read, or is another one.
    """
    data = gzip.decompress(zipfile.ZipFile(io.BytesIO(_checked_bytes(task, path))).read(INNER))
    source = task.removesuffix(STRENGTH)
    if task == ORIGIN:
        rows = _origins(data)
    elif task == AGREEMENT:
        rows = [row for name in SOURCES for row in _agreement(_spreads(data, name))]
    elif task == source:
        rows = _sentiment(_clear(data, source))
    else:
        rows = _strength(_clear(data, source))
    return DataTable(source=task, format="text-label", splits={"train": rows})


def _sentiment(means: dict[str, float]) -> list[Row]:
    """Return rows that are positive or negative."""
    return [{"text": text, "label": "positive" if mean > 0 else "negative"} for text, mean in means.items()]


def _strength(means: dict[str, float]) -> list[Row]:
    """Return rows that are strong or mild, whatever the sign: the halves below and above the median."""
    middle = statistics.median(map(abs, means.values()))
    return [{"text": text, "label": "strong" if abs(mean) > middle else "mild"} for text, mean in means.items()]


def _origins(data: bytes) -> list[Row]:
    """Return rows by where a text is from; the same number from each source, evenly over its file."""
    texts = {name: list(dict.fromkeys(text for *_, text in _lines(data, name, "GroundTruth"))) for name in SOURCES}
    least = min(map(len, texts.values()))
    return [
        {"text": own[n * len(own) // least], "label": SOURCES[name][1]}
        for name, own in texts.items()
        for n in range(least)
    ]


def _agreement(spreads: dict[str, float]) -> list[Row]:
    """Return whether those who rated a text agree more than they do on the median text of its source."""
    middle = statistics.median(spreads.values())
    return [{"text": text, "label": "agreed" if spread <= middle else "disputed"} for text, spread in spreads.items()]


def _clear(data: bytes, source: str) -> dict[str, float]:
    """Return every text that is not neutral, once, with its mean rating."""
    rated = ((float(mean), text) for _, mean, text in _lines(data, source, "GroundTruth"))
    return {text: mean for mean, text in rated if abs(mean) > NEUTRAL}


def _spreads(data: bytes, source: str) -> dict[str, float]:
    """Return every text once, with the standard deviation of its raters."""
    ratings = {own[0].lstrip(MARK): own[3] for own in _lines(data, source, "anonDataRatings")}
    return {
        text: statistics.pstdev(ast.literal_eval(ratings[number]))
        for number, _, text in _lines(data, source, "GroundTruth")
    }


def _lines(data: bytes, source: str, kind: str) -> list[list[str]]:
    """Return the columns of a file in the inner archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{SOURCES[source][0]}_{kind}.txt")
        assert member is not None  # the archive's digest has been checked
        return [line.split("\t") for line in member.read().decode("latin-1").splitlines()]


def _checked_bytes(name: str, path: Path) -> bytes:
    """Return the archive's bytes, read only after its digest is known to be right."""
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == SHA256:
                file.seek(0)
                return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", code="cannot_read") from None
    raise DataError(
        f"{path} is not the file that {name!r} is made of; remove it, then: {how_to_get(name)}", code="damaged_file"
    )


def _register(name: str, description: str, owner: str, rows: int, instruction: str) -> None:
    task = NamedTask(
        name=name,
        description=description,
        licence=f"MIT; texts from {owner}",
        rows=rows,
        instruction=instruction,
        locate=locate,
        load=partial(load, name),
        get=partial(how_to_get, name),
        package=PACKAGE,
    )
    register(task)


for _name, (_what, _owner, _rows, _one) in TEXTS.items():
    _register(_name, f"{_what}, positive or negative (VADER's ground truth)", _owner, _rows, SENTIMENT.format(_one))
for _name, (_what, _owner, _rows, _one) in TEXTS.items():
    _register(_name + STRENGTH, f"{_what}, strong or mild in feeling (VADER)", _owner, _rows, FORCE.format(_one))
_register(
    ORIGIN,
    "where a text is from: film, newspaper, product, tweet (VADER)",
    "all four",
    14788,
    "Where is this text from: film, newspaper, product or tweet? Answer with one word.",
)
_register(
    AGREEMENT,
    "whether those who rated a text's feeling agreed or disputed (VADER)",
    "all four",
    23619,
    "Would people agree on the feeling of this text, or is it disputed? Answer agreed or disputed.",
)
