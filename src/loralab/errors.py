"""Everything loralab raises on purpose.

LoralabError
├── InputError            what was given is wrong: exit code 2, nothing written
│   ├── ConfigError       an option, a field or a value                    (ValueError)
│   ├── TargetError       target_modules or another pattern names nothing   (ValueError)
│   ├── ModelError        a base model that does not exist or cannot be read (ValueError)
│   ├── DataError         rows, columns, labels or a data file               (ValueError)
│   ├── AdapterFileError  an adapter folder that is damaged, foreign or unsafe (ValueError)
│   ├── AdapterNotFoundError a name or digest that the store does not know  (LookupError)
│   └── OutputError       the place to write to cannot be used               (OSError)
└── RunError              the check or the run failed: exit code 1
    ├── AdapterStateError an operation that the adapter's present state forbids (RuntimeError)
    ├── QueueFullError    too much is asked at once; ask again later          (RuntimeError)
    ├── LearningError     the run cannot learn, or its numbers are no longer finite (RuntimeError)
    ├── TransferError     what was fetched or sent did not arrive, or is another file (RuntimeError)
    └── CertificateError  an artefact does not do what the live model does    (RuntimeError)

A message has three parts: the culprit as the user wrote it, what was expected, and the
nearest valid choice or the remedy.
"""

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE = 2000  # characters of a message; what it quotes may be as long as a file
MAX_COMPARED_NAME = 500  # characters of a name that near ones are looked for


class LoralabError(Exception):
    """Base of every error raised on purpose.

    Args:
        code: a word for programs, such as "unknown_column"; messages are for people only.
        field: the option, column or field that is wrong, where it is one.
    """

    def __init__(self, message: object = "", *, code: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field

    def __str__(self) -> str:
        """Return one line: what a message quotes of a file can neither break it nor steer a terminal."""
        return one_line(super().__str__())


class InputError(LoralabError):
    """The input is wrong; nothing has been written."""


class ConfigError(InputError, ValueError):
    """An option, a field or a value is wrong."""


class TargetError(InputError, ValueError):
    """A target or a pattern names no module of the model."""


class ModelError(InputError, ValueError):
    """A base model does not exist or cannot be read."""


class DataError(InputError, ValueError):
    """A data file, its columns, its rows or its labels are wrong."""


class AdapterFileError(InputError, ValueError):
    """An adapter folder is damaged, belongs elsewhere, or cannot be read safely."""


class AdapterNotFoundError(InputError, LookupError):
    """The store has no adapter of this name or digest."""


class OutputError(InputError, OSError):
    """The place to write to is taken, full or not writable."""


class RunError(LoralabError):
    """The input was right, and the run or the check failed."""


class AdapterStateError(RunError, RuntimeError):
    """The operation does not fit the adapter's present state."""


class QueueFullError(RunError, RuntimeError):
    """Too much is asked at once; ask again later."""


class LearningError(RunError, RuntimeError):
    """The run cannot learn, or its numbers are no longer finite."""


class TransferError(RunError, RuntimeError):
    """Something did not come over the network, or is not what was asked for."""


class CertificateError(RunError, RuntimeError):
    """An artefact does not do what the live model does."""


class LeftOutWarning(UserWarning):
    """Parts of a model are not adapted although the targets could mean them."""


class BaseMismatchWarning(UserWarning):
    """An adapter is put on another base model than the one it was trained on."""


class PluginWarning(UserWarning):
    """A package that offers methods, models or tasks cannot be used; all others work."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return the closest valid names as a phrase for the end of a message; "" if none is close.

    >>> nearest("q_porj", ["q_proj", "k_proj", "down_proj"])
    '; did you mean q_proj, k_proj?'
    """
    if len(name) > MAX_COMPARED_NAME:  # comparing takes time, and nobody mistypes that much
        return ""
    unique = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(name, unique, n=count, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def join_limited(names: Iterable[str], count: int = 8) -> str:
    """Return the first names of a long list, and how many there are beyond them."""
    listed = list(names)
    rest = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + rest


def one_line(text: str) -> str:
    """A text without line ends, control characters and halves of characters, and not too long.

    >>> one_line("a\\nb")
    'a\\\\x0ab'
    """
    if len(text) > MAX_MESSAGE:
        text = f"{text[:MAX_MESSAGE]}… and {len(text) - MAX_MESSAGE} characters more"
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def format_value(value: Any) -> str:
    """Return a value of a file as a message may quote it, however long or deeply nested it is."""
    return _SHORT.repr(value)[:100]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
