"""Damage files, by chance and by malice: the same for the same seed.

Every function takes what is whole and a source of chance, and returns something else.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import tomli_w

HUGE = (0, 1, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
STRANGE_BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\r",
    b"\n",
    b'"',
    b"'",
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b"\t",
    b"\\",
    b"1e999",
    b"-",
    b"NaN",
    b"9" * 5000,
    b"\x1b[2J",
    b"\xe2\x80\xa8",
    b"\\ud83d",
    b"../../../../etc/passwd",
    b"#",
    b"=",
    b"[[",
    b"{{",
    b"{%",
)
STRANGE_TEXTS = (
    "",
    " ",
    "x",
    "\0",
    "\n",
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody/x",
    "C:\\x",
    "a" * 5000,
    "\x1b[31m",
    "\u2028",
    "(",
    "(a+)+$",
    "(a|a)*b",
    ".*.*.*.*.*.*.*.*.*x",
    "(?i)x",
    "a{99999}",
    "[",
    "__import__('os')",
    "NaN",
    "LORA",
    "ADALORA",
    "IA3",
    "BITFIT",
    "FULL",
    "PREFIX_TUNING",
    "<script>",
    "{{ x }}",
    "\ud83d",
    "中文",
    "0",
    "-1",
    "q_proj",
    "all-linear",
    "evil/model",
)


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One to eight bytes changed."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if found:
            found[draw.randrange(len(found))] = draw.randrange(256)
    return bytes(found)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end is lost."""
    return data[: draw.randrange(len(data) + 1)]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """A piece stands there again, once or often."""
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * draw.choice((1, 2, 10)) + data[end:]


def spliced(data: bytes, draw: random.Random) -> bytes:
    """A piece of it takes the place of another."""
    a, b, c = (draw.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[min(b, c) : max(b, c)] + data[a + abs(b - c) :]


def inserted(data: bytes, draw: random.Random) -> bytes:
    """Something strange stands in it, or in front."""
    place = draw.choice((0, draw.randrange(len(data) + 1)))
    return data[:place] + draw.choice(STRANGE_BYTES) * draw.choice((1, 1, 1, 100)) + data[place:]


def numbered(data: bytes, draw: random.Random) -> bytes:
    """A huge number, as binary formats write it, over whatever was there."""
    width = draw.choice("HIQ")
    size = struct.calcsize("<" + width)
    number = draw.choice(HUGE) % (1 << 8 * size)
    place = draw.randrange(max(1, min(len(data), draw.choice((64, 512, len(data) + 1)))))
    return data[:place] + struct.pack(draw.choice("<>") + width, number) + data[place + size :]


def emptied(data: bytes, draw: random.Random) -> bytes:
    """Nothing, zeros, or noise."""
    return draw.choice((b"", bytes(len(data)), draw.randbytes(len(data)), b"[" * 100_000))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped,
    cut,
    doubled,
    spliced,
    inserted,
    numbered,
    emptied,
)


def some_bytes(data: bytes, draw: random.Random) -> bytes:
    """One or two of the above."""
    for _ in range(draw.choice((1, 1, 2))):
        data = draw.choice(BYTES)(data, draw)
    return data


def value(draw: random.Random, *, toml: bool = False) -> Any:
    """Any value that has no business there."""
    deep: Any = 1
    for _ in range(draw.choice((3, 70, 800))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    choices: list[Any] = [
        True,
        False,
        [],
        {},
        [1],
        ["x"],
        {"a": 1},
        {"": None},
        [None],
        [[]],
        0.5,
        -1.5,
        1e308,
        float("inf"),
        float("nan"),
        deep,
        draw.choice(HUGE),
        draw.choice(HUGE),
        draw.choice(HUGE),
        -(2**63),
        10**9,
        10**6,
        10**400,
        draw.choice(STRANGE_TEXTS),
        draw.choice(STRANGE_TEXTS),
        ["a" * 100] * 1000,
        list(range(1000)),
        None,
    ]
    found = draw.choice(choices)
    return 1 if toml and found is None else found


def altered(content: Any, draw: random.Random, *, toml: bool = False) -> Any:
    """A copy of lists and objects in which one to three values or keys are others."""
    found = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 3)):
        holders = [h for h in _holders(found) if h]
        if not holders:
            return value(draw, toml=toml)
        _alter(draw.choice(holders), draw, toml=toml)
    return found


def _alter(holder: Any, draw: random.Random, *, toml: bool) -> None:
    key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    change = draw.randrange(5)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[draw.choice(STRANGE_TEXTS)] = holder.pop(key)
    elif change == 2 and isinstance(holder, dict):
        holder[draw.choice((*STRANGE_TEXTS, *holder))] = value(draw, toml=toml)
    elif change == 3 and isinstance(holder, list):
        holder.insert(key, draw.choice((holder[key], value(draw, toml=toml))))
    else:
        holder[key] = value(draw, toml=toml)


def _holders(content: Any) -> list[Any]:
    """The lists and objects in it, itself included."""
    found, left = [], [content]
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            found.append(one)
            left += one.values() if isinstance(one, dict) else one
    return found


def some_json(data: bytes, draw: random.Random) -> bytes:
    """Its values, or its bytes."""
    if draw.random() < 0.3:
        return some_bytes(data, draw)
    try:
        return json.dumps(altered(json.loads(data), draw)).encode()
    except RecursionError:  # what can be made in memory cannot always be written
        return data


def some_toml(data: bytes, draw: random.Random) -> bytes:
    """Its values, or its bytes."""
    import tomllib

    if draw.random() < 0.4:
        return some_bytes(data, draw)
    try:
        return tomli_w.dumps(altered(tomllib.loads(data.decode()), draw, toml=True)).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):  # what TOML cannot hold
        return some_bytes(data, draw)


def some_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON Lines: values of a line, or bytes."""
    if draw.random() < 0.4:
        return some_bytes(data, draw)
    lines = data.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(altered(json.loads(lines[place]), draw)).encode()
    return b"\n".join(lines) + b"\n"


def some_table(data: bytes, draw: random.Random) -> bytes:
    """CSV: quotes without an end, huge fields, many columns, or bytes."""
    place = draw.randrange(len(data))
    piece = draw.choice(
        (
            b'"',
            b'""',
            b'"' * 3,
            b"," * 50_000,
            b"x" * 200_000,
            b"\r",
            b'\n"',
            b"\0",
            b"a," * 20_000,
            b"\n" * 1000,
            b'"\n' * 1000,
        )
    )
    return some_bytes(data, draw) if draw.random() < 0.5 else data[:place] + piece + data[place:]


def some_tensors(data: bytes, draw: random.Random) -> bytes:
    """safetensors: its header, or its bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    change = draw.randrange(6)
    if change == 0:
        return some_bytes(data, draw)
    if change == 1:
        return struct.pack("<Q", draw.choice(HUGE) % 2**64) + header + body
    if change == 2:  # a key twice
        header = header.replace(b"{", b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', 1)
    elif change == 3:
        kinds = (b'"F16"', b'"I64"', b'"F8_E4M3"', b'"F4"', b'"C64"', b'"BOOL"', b'"U16"', b'"?"')
        header = header.replace(b'"F32"', draw.choice(kinds), draw.choice((1, 100)))
    elif change == 4:
        body = _numbers(body, draw)
    else:
        header = json.dumps(_reshaped(json.loads(header), draw)).encode()
    return struct.pack("<Q", len(header)) + header + body


def _reshaped(header: Any, draw: random.Random) -> Any:
    """Shapes turned round or made flat, tensors renamed or left out, offsets that lie."""
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    change, entry = draw.randrange(5), header[name]
    if change == 0:
        return altered(header, draw)
    if change == 1:
        entry["shape"] = entry["shape"][::-1]
    elif change == 2:
        size = 1
        for side in entry["shape"]:
            size *= side
        entry["shape"] = draw.choice(([size], [1, size], [size, 1, 1], [1, 1, size, 1]))
    elif change == 3:
        header[draw.choice(STRANGE_TEXTS)] = header.pop(name)
    else:
        entry["data_offsets"] = [draw.choice(HUGE), draw.choice(HUGE)]
    return header


def _numbers(body: bytes, draw: random.Random) -> bytes:
    """Numbers that are not finite, or as large as they can be."""
    place = 4 * draw.randrange(max(1, len(body) // 4))
    number = draw.choice((float("nan"), float("inf"), 3e38, 1e-45, -0.0))
    return body[:place] + struct.pack("<f", number) + body[place + 4 :]


def some_head(data: bytes, draw: random.Random) -> bytes:
    """GGUF: counts, lengths, types and offsets of its head, or its bytes."""
    if draw.random() < 0.3:
        return some_bytes(data, draw)
    head = min(len(data), draw.choice((24, 200, 2000, 20_000)))
    width, size = draw.choice((("I", 4), ("Q", 8), ("Q", 8)))
    number = draw.choice((*HUGE, 2, 3, 7, 8, 9, 12, 13, 100, 1000)) % (1 << 8 * size)
    place = draw.randrange(max(1, head - size))
    return data[:place] + struct.pack("<" + width, number) + data[place + size :]


def some_footer(data: bytes, draw: random.Random) -> bytes:
    """Parquet: mostly its end, where everything is described."""
    start = draw.choice((0, len(data) // 2, max(0, len(data) - 600)))
    return data[:start] + some_bytes(data[start:], draw)


def some_picture(data: bytes, draw: random.Random) -> bytes:
    """A picture: absurd sides with a right checksum (PNG), or its bytes."""
    if data[:4] == b"\x89PNG" and draw.random() < 0.4:
        sides = [draw.choice((0, 1, 2, 30_000, 2**31 - 1, 10**6)) for _ in range(2)]
        fields = b"IHDR" + struct.pack(">II", *sides) + data[24:29]
        return data[:12] + fields + struct.pack(">I", zlib.crc32(fields)) + data[33:]
    return some_bytes(data, draw)


PIECES = (
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{{ x * 99999 }}",
    "{% set x = x ~ x %}",
    "{% set x = [x, x] %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages|map('upper')|join }}",
    "{{ messages[0].content * 10**9 }}",
    "{{ raise_exception(1) }}",
    "{{ 1 / 0 }}",
    "{{ x.y.z }}",
    "{{ ''.join(messages) }}",
    "{% set messages = messages * 9999 %}",
    "{{ '%9999999d' % 1 }}",
    "{{ messages|tojson(indent=9999999) }}",
    "{% include 'x' %}",
    "{% extends x %}",
    "{{ messages.append(1) }}",
    "{{ namespace(a=1).a }}",
    "{{ cycler(1).next.__globals__ }}",
    "{% set x = ('a' * 99999)|replace('a', 'b' * 99999) %}",
    "{{ (" * 200,
    "{% if %}",
    "{{ self._TemplateReference__context }}",
    "{{ strftime_now('%9999999Y') }}",
    "{{ 9**9**9 }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% break %}",
)


def some_template(data: bytes, draw: random.Random) -> bytes:
    """A chat template: pieces of programs in it, or bytes."""
    if draw.random() < 0.2:
        return some_bytes(data, draw)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        data = data[:place] + draw.choice(PIECES).encode() + data[place:]
    return data
