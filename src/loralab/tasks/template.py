"""Chat templates, which come with a model and are programs: in a sandbox, and within limits.

The sandbox is jinja's own for templates of strangers. It stops what reaches for Python, and
neither a loop within a loop within a loop nor a text that is doubled forty times. So whatever a
template makes is weighed - with what it holds, each time that it is held - and may not exceed a
multiple of the conversation; its time and its output are counted.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_SECONDS = 2.0  # of the processor, for one conversation
MIN_ALLOWANCE, MAX_EXPANSION = 1 << 20, 16  # characters that any conversation may become; times its own
MAX_TEMPLATE = 1 << 20  # characters of a template
STEP_CHARACTERS = 8  # characters that a step of a loop, a call and an element count as
MAX_FIELD_WIDTH = 1000  # of a field, in a filter or a format
FORBIDDEN_FILTERS = ("center", "wordwrap", "urlize", "xmlattr", "pprint", "striptags", "forceescape")
WIDE = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)|\{[^{}]*(\d{4}|:[^{}]*\{)")  # fields of a format
PADDING = ("center", "ljust", "rjust", "zfill")
FORBIDDEN_METHODS = ("encode", "translate", "maketrans", "expandtabs")


class _TooMuchError(jinja2.TemplateRuntimeError):
    """A limit is reached."""


class _Allowance(threading.local):
    """Budget of the template that runs in this thread."""

    characters = most = MIN_ALLOWANCE
    until = float("inf")

    def begin(self, size: int) -> None:
        self.characters = self.most = max(MIN_ALLOWANCE, MAX_EXPANSION * size)
        self.until = time.thread_time() + MAX_SECONDS

    def spend(self, characters: int = STEP_CHARACTERS) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise _TooMuchError(f"it writes more than {self.most:,} characters")
        if time.thread_time() > self.until:
            raise _TooMuchError(f"it takes more than {MAX_SECONDS:.0f} seconds")


_allowance = _Allowance()


def render(
    template: str,
    chat: Sequence[Mapping[str, Any]],
    *,
    prompt: bool,
    tokens: Mapping[str, Any],
    now: datetime | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Write a conversation as text.

    Args:
        prompt: open the next answer.
        tokens: the special tokens by their names, such as bos_token.
        now: the time that a template may write; None is the present.
        tools: functions that the next answer may call.
        kwargs: values of variables of the template's own.

    Raises:
        Exception: whatever a template can raise, jinja's errors and Python's.
    """
    compiled = _compiled(template)
    messages = [dict(message) for message in chat]
    _allowance.begin(sum(map(_length, [*(text for message in messages for text in message.values()), *tools])))
    values = {**tokens, **(kwargs or {}), "messages": messages, "tools": list(tools) or None, "documents": None}
    values["strftime_now"] = _clock(now or datetime.now())
    return compiled.render(**values, add_generation_prompt=prompt)


def _length(given: Any) -> int:
    return len(given) if isinstance(given, str) else len(json.dumps(given))


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise _TooMuchError(f"it has {len(template):,} characters itself")
    return _Bounded(len(template)).from_string(template)


def _weighed(value: Any) -> Any:
    """Return the value, if all that it holds is no more than the allowance; what is held twice counts so.

    So nothing is ever made that could not be written, compared or copied in the same time.
    """
    if isinstance(value, str | list | tuple | dict | Namespace | int):
        weight = 0
        for part in _parts(value):
            weight += STEP_CHARACTERS + (len(part) if isinstance(part, str) else 0)
            if isinstance(part, int) and part.bit_length() > 1 << 10:
                raise _TooMuchError("it makes a number of more than 300 digits")
            if weight > _allowance.most:
                raise _TooMuchError(f"it makes more than {_allowance.most:,} characters")
    return value


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and all that it holds."""
    left = [iter((value,))]
    while left:
        for part in left[-1]:
            yield part
            held = part._Namespace__attrs if isinstance(part, Namespace) else part
            if isinstance(held, dict):
                left.append(iter([*held.keys(), *held.values()]))
                break
            if isinstance(held, list | tuple):
                left.append(iter(held))
                break
        else:
            left.pop()


def _require_room(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before there is one."""
    sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    numbers = [side for side in (left, right) if isinstance(side, int)]
    bits = [abs(number).bit_length() for number in numbers]
    if operator == "*" and sizes and numbers:
        room = sizes[0] * numbers[0]
    elif operator == "**" and len(numbers) == 2:
        room = _allowance.most if bits[0] * right > 1 << 10 else 0
    else:
        room = sum(sizes) + sum(bits)
    if isinstance(left, bytes) or (operator == "%" and isinstance(left, str)):
        _require_narrow(left)
    if room > _allowance.most:
        raise _TooMuchError(f"it makes more than {_allowance.most:,} characters")


def _require_narrow(layout: Any) -> None:
    """Refuse formats that ask for wide fields."""
    if isinstance(layout, bytes) or WIDE.search(layout):
        raise _TooMuchError("it formats with too wide a field")


def _require_short(name: str, text: str, given: Sequence[Any]) -> None:
    """Refuse what a method of a text, or the filter of the same name, would make too long."""
    if name in ("format", "format_map"):
        _require_narrow(text)
    elif name == "replace" and len(given) > 1:
        old, new = (str(value) for value in given[:2])
        if len(text) + (text.count(old) + 1) * len(new) > _allowance.most:
            raise _TooMuchError(f"it makes more than {_allowance.most:,} characters")
    elif name in FORBIDDEN_METHODS:
        raise _TooMuchError(f"it calls {name}, which is not allowed here")
    elif name == "indent" and (text.count("\n") + 1) * MAX_FIELD_WIDTH > _allowance.most:
        raise _TooMuchError(f"it makes more than {_allowance.most:,} characters")


def _require_joined(between: str, parts: Any) -> None:
    """Return the length of what join would make."""
    held = list(parts) if isinstance(parts, list | tuple | dict) else []
    if len(between) * len(held) > _allowance.most:
        raise _TooMuchError(f"it makes more than {_allowance.most:,} characters")


def _limited(name: str, filtered: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose arguments and whose result are weighed."""

    @functools.wraps(filtered)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _allowance.spend()
        given = [list(a) if isinstance(a, GeneratorType) else a for a in args]
        skipped = 1 if hasattr(filtered, "jinja_pass_arg") else 0  # the context, or its like
        weighed = [_weighed(one) for one in (*given[skipped:], *kwargs.values())]
        value, others = weighed[0], weighed[1:]
        _require_options(name, others)
        if isinstance(value, str):
            _require_short(name, value, others)
        if name == "join":
            _require_joined(str(others[0] if others else ""), value)
        return _weighed(filtered(*given, **kwargs))

    return bounded


def _require_options(name: str, given: Sequence[Any]) -> None:
    """Yield numbers that are widths, and texts that stand for one."""
    if any(isinstance(one, int) and one > MAX_FIELD_WIDTH for one in given):
        raise _TooMuchError(f"it calls {name} with a number above {MAX_FIELD_WIDTH}")
    if name in ("indent", "tojson") and any(isinstance(one, str) for one in given):
        raise _TooMuchError(f"it calls {name} with a text for a width")
    if name == "sum" and any(isinstance(one, list | tuple) for one in given):
        raise _TooMuchError("it sums what are not numbers")


class _Counting(NodeTransformer):
    """Every loop is counted, every list and every joined text is weighed."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja's name, as below)
        self.generic_visit(node)
        inside = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filter(node.iter, "_counted", nodes.Const(inside))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(list(node.nodes), lineno=node.lineno), "_concatenated")

    def visit_List(self, node: nodes.Literal) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_weighed")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_weighed") if node.ctx == "load" else node


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _counted(values: Any, inside: int) -> Iterator[Any]:
    for value in values:
        _allowance.spend(STEP_CHARACTERS + inside)
        yield value


def _concatenated(parts: list[Any]) -> str:
    return str(_weighed("".join(map(str, _weighed(parts)))))


class _Generation(Extension):
    """{% generation %}: marks the assistant's words, which is of no use here."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable to jinja)

    def parse(self, parser: Any) -> nodes.Node:
        """Return the block as it is, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class _Bounded(ImmutableSandboxedEnvironment):
    """As transformers sets it up for chat templates, with limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, length: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_written,
        )
        self._length = length
        self.filters["tojson"] = _to_json
        kept = {n: f for n, f in self.filters.items() if n not in FORBIDDEN_FILTERS}
        self.filters = {name: _limited(name, own) for name, own in kept.items()}
        self.filters |= {"_counted": _counted, "_concatenated": _concatenated, "_weighed": _weighed}
        self.globals |= {"raise_exception": _refuse, "dict": _dict}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return one operation that can make something large."""
        _require_room(operator, left, right)
        return _weighed(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a macro, a function or a method."""
        writes = isinstance(obj, Macro | BlockReference | LoopContext)
        _allowance.spend(STEP_CHARACTERS + self._length * writes)
        method = getattr(obj, "__wrapped__", obj)
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        given = [list(a) if isinstance(a, GeneratorType) else a for a in args]
        for one in (*given, *kwargs.values()):
            _weighed(one)
        if isinstance(text, str):
            if name in PADDING and any(isinstance(one, int) and one > MAX_FIELD_WIDTH for one in given):
                raise _TooMuchError(f"it calls {name} with a number above {MAX_FIELD_WIDTH}")
            _require_short(name, text, given)
            if name == "join":
                _require_joined(text, given[0] if given else ())
        return _weighed(super().call(context, obj, *given, **kwargs))


def _written(value: Any) -> Any:
    """Count what is about to be written."""
    text = value if isinstance(value, Markup) else str(_weighed(value))
    _allowance.spend(len(text))
    return text


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _clock(now: datetime) -> Callable[[str], str]:
    """Return strftime_now: a closure, as a template can read the fields of any other object."""

    def strftime_now(layout: str) -> str:
        _require_narrow(layout)
        return now.strftime(layout)

    return strftime_now
