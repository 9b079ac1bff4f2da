"""Write docs/reference/: the command line from the commands, Python from `loralab.__all__`.

python docs/site/reference.py            # tests/test_site.py says when it is due
"""

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import loralab
from loralab.cli import load_commands

FOLDER = Path(__file__).parents[1] / "reference"
GROUPS = {
    "adapters": "Adapt a model",
    "training": "Train, score, ask",
    "tasks": "Data",
    "models": "Models",
    "artefacts": "Leave, with proof",
    "integrations": "A model hub",
    "serving": "Serve",
    "studies": "Questions answered by measurement",
    "errors": "Errors",
}


def main() -> None:
    """Write both pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return file name -> Markdown."""
    return {"cli.md": command_line(), "python.md": python()}


def command_line() -> str:
    """Return all commands with their arguments and options, in the order of the names."""
    commands: dict[str, Any] = load_commands().commands  # without the options of a method from outside
    head = [
        "# Command line",
        "",
        "Generated from the commands by `python docs/site/reference.py`. `loralab COMMAND --help` says the same.",
        "Exit codes: 0 done, 1 the check or run failed, 2 the input was wrong, 3 undecided.",
        "",
    ]
    return "\n".join([*head, *(line for name in sorted(commands) for line in _command(name, commands[name]))]) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if not p.opts[0].startswith("-")]
    options = [p for p in command.params if p.opts[0].startswith("-")]
    shown = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)
    yield from (
        f"## {name}",
        "",
        command.help,
        "",
        "```sh",
        f"loralab {name} {shown}".rstrip() + " [OPTIONS]",
        "```",
        "",
    )
    if arguments:
        yield from _table(("argument", "", ""), ((f"`{p.name.upper()}`", _kind(p), _text(p.help)) for p in arguments))
    for panel in dict.fromkeys(p.rich_help_panel for p in options):
        if panel:
            yield from (f"**{_text(panel)}**", "")
        mine = (p for p in options if p.rich_help_panel == panel)
        yield from _table(("option", "", ""), ((_flags(p), _kind(p), _text(p.help)) for p in mine))
    for below, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _command(f"{name} {below}", inner)


def _flags(option: Any) -> str:
    return " ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))


def _kind(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    if parameter.nargs == -1 or getattr(parameter, "multiple", False):
        return "several"
    return "" if kind is bool else str(getattr(kind, "__name__", kind)).lower()


def _text(text: str | None) -> str:
    """Return a help text as a cell: rich's markup becomes brackets, and bars are escaped."""
    plain = re.sub(r"\s*\[dim\](.*?)\[/\]", r" (\1)", text or "")
    return plain.replace("|", r"\|").replace("<", "&lt;")


def python() -> str:
    """Return the public names by part, each with its docstring; mkdocstrings fills the directives."""
    head = [
        "# Python",
        "",
        "Generated from `loralab.__all__` by `python docs/site/reference.py`; the site shows each docstring,",
        "and so does `help(loralab.attach)`. `import loralab` loads no torch; a name is resolved on its first use.",
        "",
    ]
    places = {name: place for name, place in loralab._WHERE.items() if name in loralab.__all__}
    lines = [*head]
    for part, title in GROUPS.items():
        mine = {name: place for name, place in places.items() if place.partition(".")[0] == part}
        lines += [f"## {title}", ""]
        lines += [line for name, place in mine.items() for line in _name(name, place)]
    missing = {place.partition(".")[0] for place in places.values()} - set(GROUPS)
    if missing:
        raise SystemExit(f"docs/site/reference.py: no title for {sorted(missing)}")
    return "\n".join(lines)


def _name(name: str, place: str) -> Iterator[str]:
    yield from (f"### loralab.{name}", "", f"::: loralab.{place}.{name}", "")
    if name[0].isupper() and dataclasses.is_dataclass(found := getattr(loralab, name)):
        yield from _fields(found)


def _fields(config: type) -> Iterator[str]:
    hints = get_type_hints(config, include_extras=True)
    rows = []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        plain, *notes = get_args(hint) if hasattr(hint, "__metadata__") else (hint, "")
        rows.append((f"`{field.name}`", f"`{_type(plain)}`", _default(field), _text(str(notes[0]))))
    if any(row[3] for row in rows):
        yield from _table(("field", "type", "default", ""), rows)


def _type(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if get_origin(kind) is not None and not isinstance(kind, type):
        return re.sub(r"(typing|collections\.abc|types)\.", "", str(kind)).replace("|", "or")
    return getattr(kind, "__name__", str(kind))


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()!r}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


if __name__ == "__main__":
    sys.exit(main())
