"""Linear layers whose weight a model reads without calling them.

An update beside such a layer never acts, until it is merged: then it does (`dt_proj` of Mamba).
Nothing of this shows in the modules, so the source of the classes that hold the layers is read:
each `<path>.weight` that is not a question about its dtype, device or shape.
"""

import ast
import functools
import inspect
import linecache
import re
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

READ_REASON = "the model reads its weight without calling it"
WRITTEN_REASON = "the model itself changes its weight"
QUESTIONS = {  # what may be asked of a weight without computing with it
    "dtype",
    "device",
    "shape",
    "ndim",
    "is_cuda",
    "is_meta",
    "is_floating_point",
    "requires_grad",
    "size",
    "dim",
    "numel",
    "data_ptr",
    "element_size",
}
NOT_RUN = ("__init__", "reset_parameters", "extra_repr", "__repr__")
NOT_RUN_ENDS = ("_weights", "embeddings", "_lm_head", "_bias")  # start, tie, resize
NO_MODELING_CODE = r"(torch|builtins|loralab|transformers(?!\.models))(\.|$)"  # no modeling code
READ_MOSTLY = ("dt_proj",)  # of Mamba's kin: called only where it is in few bits
Function = tuple[ast.AST, dict[str, str]]  # its syntax, and what its local names stand for


def read_uncalled(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return which of some layers a model reads without calling them -> why they cannot be adapted."""
    return {name: reason for name, reason in _reasons(model, names) if reason}


def read_sometimes(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return which of some layers a model calls, and reads instead on some of its ways."""
    return {name for name, reason in _reasons(model, names) if not reason}


def _reasons(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each layer whose weight is read, and why it cannot be adapted; empty where it can."""
    for path, module in model.named_modules():
        kind: Any = type(module)
        for end, written in _reads(kind).items():
            for name in _meant(path, end, names):
                if written:
                    yield name, WRITTEN_REASON
                    continue
                path_of_owner, _, leaf = name.rpartition(".")
                owner: Any = model.get_submodule(path_of_owner)
                owners: Any = type(owner)
                called = {end.lstrip("?"), leaf} & (_calls(kind) | _calls(owners))
                both = (called and leaf not in READ_MOSTLY) or isinstance(owner, nn.Sequential)
                yield name, "" if both else READ_REASON


def _meant(path: str, end: str, names: Collection[str]) -> list[str]:
    """Return the layers that a class means by `self.<end>`, or by `<variable>.<end>`: those below."""
    start = re.escape(f"{path}.") if path else ""
    between = r"(.*\.)?" if end.startswith("?") else ""
    pattern = start + between + re.escape(end.lstrip("?")).replace(r"\*", "[^.]+")
    return [name for name in names if re.fullmatch(pattern, name)]


@functools.cache
def _reads(kind: type[nn.Module]) -> dict[str, bool]:
    """Return the weights that a class reads, by the end of their path -> whether it writes to them."""
    found: dict[str, bool] = {}
    for function in _functions(kind):
        if "weight" not in _names(function.__code__):
            continue  # most functions: not worth reading
        tree, variables = _parsed(function)
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                end, use = _end(node.value, variables), _use(node, parents)
                if end and use:
                    found[end] = found.get(end, False) or use == "written"
    return found


@functools.cache
def _calls(kind: type[nn.Module]) -> frozenset[str]:
    """Return the modules that a class calls, by the end of their path."""
    found = set()
    for tree, variables in map(_parsed, _functions(kind)):
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found |= {_end(function, variables).lstrip("?") for function in calls}
    return frozenset(found - {""})


def _functions(kind: type[nn.Module]) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if re.match(NO_MODELING_CODE, base.__module__):
            continue
        for name, kept in vars(base).items():
            if name in NOT_RUN or name.endswith(NOT_RUN_ENDS):
                continue
            function = kept.fget if isinstance(kept, property) else kept
            if isinstance(function, FunctionType):
                inner = inspect.unwrap(function)
                if isinstance(inner, FunctionType):
                    yield inner


def _names(code: CodeType) -> set[str]:
    """Return the names that a function uses, those of functions in it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _parsed(function: FunctionType) -> Function:
    """Return the syntax of a function; an empty one where there is no source."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    try:
        tree = ast.parse(textwrap.dedent("".join(inspect.getblock(lines))))
    except (SyntaxError, IndexError, tokenize.TokenError):
        return ast.Module([], []), {}
    variables: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            variables[node.targets[0].id] = _end(node.value, {})
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            several = _end(node.iter, {})
            variables[node.target.id] = several and f"{several}.*"
    return tree, {name: end for name, end in variables.items() if end}


def _use(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> str:
    """Return how a weight is used: "read", "written", or nothing that computes."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute) and parent.attr == "data":
        parent = parents[parent]
    if isinstance(parent, ast.Attribute):
        if parent.attr in QUESTIONS or isinstance(parent.ctx, ast.Store):
            return ""
        return "written" if re.fullmatch(r"[^_].*[^_]_", parent.attr) else "read"
    asked = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name)
    if asked and parent.func.id in ("isinstance", "hasattr", "getattr"):  # type: ignore[attr-defined]
        return ""
    stored = not isinstance(node.ctx, ast.Load)
    return "" if stored or isinstance(parent, ast.Compare) else "read"


def _end(node: ast.expr, variables: dict[str, str]) -> str:
    """Return "a.b" for `self.a.b`, and for `a.b` of a variable that stands for self.a; "a.*" for `self.a[0]`.

    Of another variable more than one step, `block.a.b` -> "?a.b".
    """
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        parts.insert(0, node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    if node.id in variables:
        return ".".join([variables[node.id], *parts])
    if node.id == "self":
        return ".".join(parts)
    return "?" + ".".join(parts) if len(parts) > 1 and "*" not in parts else ""
