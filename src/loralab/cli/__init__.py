"""Arguments in, exit code out; no logic. Commands import what they need when they run."""

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer
from typer.exceptions import Abort, Exit, TyperException

from loralab.cli.app import app
from loralab.errors import InputError, LoralabError

INTERRUPTED = 130
# what libraries make when they are imported stays: to look through all of it again and again takes a tenth of the start
SPARING = (50_000, 20, 10)
NO_MEMORY = ("can't allocate memory", "out of memory")  # torch says it in a RuntimeError


def main() -> None:
    """Run the console script: 0 done, 1 the check or run failed, 2 the input was wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _as_interrupt)
    threading.excepthook = _thread_ended
    gc.set_threshold(*SPARING)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors go to standard error, one line each."""
    try:
        result: Any = load_commands(arguments).main(arguments, prog_name="loralab", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return _ended(error, arguments)
    if result == INTERRUPTED:  # what typer makes of Ctrl-C
        return _interrupted(arguments)
    return result if isinstance(result, int) else 0


def load_commands(arguments: Sequence[str] = ("train",)) -> Any:
    """Return the command of all commands, with the options of the method that is typed."""
    from loralab.cli import artefacts, assets, card, demo, predict, serve, study, train  # noqa: F401  (they add commands)

    train.take_method(arguments)
    return typer.main.get_command(app)


def _ended(error: BaseException, arguments: list[str]) -> int:
    """Print an error for the user and return its exit code."""
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (nobody reads on)
        return 0
    if isinstance(error, Exit):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt | Abort):
        return _interrupted(arguments)
    if isinstance(error, TyperException):
        return _say(f"error: {' '.join(error.format_message().split())}", 2)
    if isinstance(error, LoralabError):
        return _fail(error, 2 if isinstance(error, InputError) else 1)
    what = f"internal error: {type(error).__name__}: "
    return _fail(error, 1, "error: memory ran out: " if _is_memory(error) else what)


def _is_memory(error: BaseException) -> bool:
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which a scheduler sends before it kills, as Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # a shell ignores Ctrl-C for what it starts in the background
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Raise again, where it is called, what TensorBoard cannot write in its thread."""
    if not isinstance(ended.exc_value, OSError):
        threading.__excepthook__(ended)


def _interrupted(arguments: list[str]) -> int:
    """Say so, and how to go on where a command can."""
    commands: Any = typer.main.get_command(app)
    command = next((commands.commands[name] for name in arguments if name in commands.commands), None)
    can_resume = command is not None and any("--resume" in own.opts for own in command.params)
    hint = "; to go on, give the same command with --resume" if can_resume else ""
    return _say(f"interrupted{hint}", INTERRUPTED)


def _fail(error: BaseException, code: int, prefix: str = "error: ") -> int:
    if os.environ.get("LORALAB_DEBUG"):
        import traceback

        traceback.print_exception(error)
    hint = "" if prefix.startswith("error") else "  (LORALAB_DEBUG=1 shows where)"
    return _say(prefix + " ".join(str(error).split()) + hint, code)


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print our own warnings as one line; those of libraries are for their developers."""
    if category.__module__.startswith("loralab"):
        print(f"warning: {message}", file=sys.stderr)
