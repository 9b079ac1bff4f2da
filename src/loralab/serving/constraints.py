"""Structured outputs: a grammar allows only some tokens at each step, whatever their probability.

llguidance compiles JSON schemas, regular expressions and grammars, and says which tokens may come
next. It computes that in a thread of its own, without Python's lock, while the model reads the
token before: nobody waits for another's mask. Needs the extra `serve`; where llguidance is missing,
asking for structure is an error that says so.
"""

import contextlib
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.errors import ConfigError
from loralab.models.load import Base

JSON, REGEX, CHOICE, GRAMMAR = "schema", "regex", "choice", "grammar"
MAX_CHARACTERS = 20_000  # of a schema as JSON, a regular expression or a grammar
MAX_DEPTH = 48  # of a schema, counted as JSON
MAX_PROPERTIES = 256  # of a schema, all its objects together
MAX_CHOICES = 1000
MAX_REPEATS = 1000  # of a repetition in an expression, and significant digits of multipleOf: more take for ever
MAX_EXPANDED = 300_000  # characters of an expression once its repetitions are written out
MAX_STEPS = 20_000  # of the search for a finite value of a schema
REPEATS = re.compile(r"\{\s*(\d+)?\s*(?:,\s*(\d+)?)?\s*\}")
PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|" + REPEATS.pattern + "|.", re.DOTALL)
NAMED_REPEATS = re.compile(r"(?<![\w\\])[A-Za-z_]\w*" + REPEATS.pattern)
MULTIPLE = re.compile(r"multipleOf\W*([-+.\w]+)")
MAX_COMPILED = 64  # grammars that are kept
MAX_PROBLEM = 200  # characters of what llguidance says
# a model that pads for ever never ends; what people and programs write fits
OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,16}"}
LIMITS = {"initial_lexer_fuel": 200_000, "max_grammar_size": 50_000, "max_lexer_states": 50_000}


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Structure that a request asks for.

    Attributes:
        kind: of `source`: JSON (a schema), REGEX, CHOICE (texts), GRAMMAR (Lark, or GBNF).
        field: of the request, named in errors.
        strict: refuse a schema with unsupported keywords; else they are left out, and named in the warning.
        schemas: the JSON schemas inside the source of a grammar.
    """

    kind: str
    source: Any
    field: str
    strict: bool = True
    schemas: tuple[Any, ...] = ()


class Constraint:
    """The grammar state of one answer: the tokens that may come next.

    Args:
        end: llguidance's token for the end of an answer; `stops` are those that end this one.

    Attributes:
        stopped: only the end may follow.
        error: why the grammar cannot be followed any more; empty as a rule.
    """

    def __init__(
        self, matcher: Any, pool: ThreadPoolExecutor, vocab_size: int, *, end: int, stops: Iterable[int]
    ) -> None:
        self._matcher, self._pool, self._vocab_size = matcher, pool, vocab_size
        self._end, self._stops = end, sorted(stops)
        self.stopped, self.error = False, ""
        self._blocked = pool.submit(self._next)

    def allow(self, row: Tensor, raw: Tensor) -> Tensor:
        """Return logits (V,) that are minus infinity for what may not come.

        Args:
            raw: the model's own, taken where `row` leaves nothing that may come.
        """
        blocked = self._blocked.result().to(row.device)
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())
            return row
        found = row.masked_fill(blocked, -torch.inf)
        if not found.max().isfinite():  # nothing is left, or there are numbers that no model should give
            raw = row if (found > -torch.inf).any() else raw
            found = raw.nan_to_num().masked_fill(blocked, -torch.inf)
        return found

    def _next(self) -> Tensor:
        """Return the tokens that may not come next, (V,)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")
        may_end, allowed[self._end] = allowed[self._end], 0
        allowed[self._stops] = may_end
        return torch.from_numpy(allowed[: self._vocab_size] == 0)

    def note(self, token: int) -> None:
        """Take the token that came; what may follow is computed meanwhile."""
        if self.error:
            return
        if not self._matcher.consume_token(self._end if token in self._stops else token):
            self.error = _first_line(self._matcher.get_error())
        self.stopped = self._matcher.is_stopped()
        if not self.stopped:
            self._blocked = self._pool.submit(self._next)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A grammar ready for any number of answers; `warning` says what of it is not kept."""

    matcher: Any
    warning: str


class Constraints:
    """The grammars of one base's tokenizer; for any number of threads."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._tables: Any = None
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()
        self._pool = ThreadPoolExecutor(2, "mask")

    @property
    def _vocab_size(self) -> int:
        """Return how many tokens have logits."""
        return int(self._base.model.get_output_embeddings().weight.shape[0])

    def tables(self, field: str) -> Any:
        """Return llguidance's tables of the tokenizer; the first time takes seconds and holds Python's lock.

        Raises:
            ConfigError: llguidance is missing, or does not know the tokenizer.
        """
        _library(field)
        with self._lock:
            if self._tables is None:
                from llguidance.hf import from_tokenizer

                own = self._base.tokenizer
                try:
                    self._tables = from_tokenizer(own, n_vocab=max(len(own), self._vocab_size))
                except Exception as error:  # a kind that it does not know
                    problem = str(error)[:MAX_PROBLEM]
                    raise ConfigError(
                        f"{field}: the tokenizer of {self._base.name} cannot be constrained: {problem}",
                        code="unsupported_tokenizer",
                        field=field,
                    ) from None
            return self._tables

    def compile(self, grammar: Grammar) -> Compiled:
        """Return a grammar for any number of answers.

        Raises:
            ConfigError: it is too large or does not compile, llguidance is missing, or does not know the
                tokenizer.
        """
        lib = _library(grammar.field)
        text = _text_of(lib, grammar)
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        matcher = _matcher(lib, self.tables(grammar.field), grammar, text)
        compiled = Compiled(matcher=matcher, warning=" ".join(matcher.get_grammar_warnings())[:MAX_PROBLEM])
        with self._lock:
            self._compiled[text] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def begin(self, compiled: Compiled, stops: Iterable[int]) -> Constraint:
        """Return the structure of an answer that begins now, and ends with one of `stops`."""
        matcher, end = compiled.matcher.deep_copy(), self._tables.eos_token
        return Constraint(matcher, self._pool, self._vocab_size, end=end, stops=stops)


def _matcher(lib: Any, tokenizer: Any, grammar: Grammar, text: str) -> Any:
    """Return a grammar compiled for a tokenizer; Python's lock is not held meanwhile."""
    limits = lib.LLParserLimits(verbose_errors=False, precompute_large_lexemes=False, **LIMITS)
    matcher = lib.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error() or matcher.is_stopped():
        raise _invalid(grammar, matcher.get_error() or "it allows nothing but an empty answer")
    return matcher


def _library(field: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            f"{field} needs llguidance, which is not installed here: pip install 'loralab[serve]'",
            code="missing_extra",
            field=field,
        ) from None
    return llguidance


def _text_of(lib: Any, grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it, if it is not too large."""
    source = grammar.source
    for schema in (source,) if grammar.kind == JSON else grammar.schemas:
        _require_bounded(grammar, schema)
    if grammar.kind == JSON:
        options: Any = {**OPTIONS, "lenient": not grammar.strict}
        return str(lib.LLMatcher.grammar_from_json_schema(json.dumps(source), overrides=options))
    if grammar.kind == CHOICE:
        if not 1 <= len(source) <= MAX_CHOICES or not all(source):
            raise _invalid(grammar, f"takes 1 to {MAX_CHOICES} texts, none of them empty")
        source = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in source)
    if len(source) > MAX_CHARACTERS:
        raise _invalid(grammar, f"it has {len(source)} characters, and at most {MAX_CHARACTERS} are read")
    if grammar.kind != CHOICE and not grammar.schemas:
        _require_few_repeats(grammar, source)
    if grammar.kind == REGEX:
        return str(lib.LLMatcher.grammar_from_regex(source))
    if grammar.kind == GRAMMAR and "::=" in source:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            source = any_to_lark(source)
        except Exception as error:  # of a parser by hand
            raise _invalid(grammar, str(error)) from None
    return str(lib.LLMatcher.grammar_from_lark(source))


def _require_few_repeats(grammar: Grammar, text: str) -> None:
    """Refuse an expression, or a grammar with some, whose automaton would be huge."""
    if "%json" in text and "\\u" in text:
        raise _invalid(grammar, "characters in a schema of a grammar are written as they are, not as \\u")
    counts = [int(count) for pair in REPEATS.findall(text) for count in pair if count]
    large = max(counts, default=0) > MAX_REPEATS
    if large or not all(_is_short(number) for number in MULTIPLE.findall(text)):
        raise _invalid(grammar, f"it repeats something, or has a multipleOf, of more than {MAX_REPEATS}")
    size = _expanded(text)
    if grammar.kind == GRAMMAR:  # a repeated rule may hold others
        size *= math.prod(_most(pair) for pair in NAMED_REPEATS.findall(text))
    if size > MAX_EXPANDED:
        raise _invalid(grammar, f"its repetitions stand for more than {MAX_EXPANDED} characters")


def _expanded(text: str) -> int:
    """Return about how many characters an expression has once its repetitions are written out."""
    groups, last = [0], 0  # lengths of the groups that are open; of the last piece
    for piece in PIECES.finditer(text):
        if piece[0] == "(":
            groups.append(0)
            last = 0
        elif piece[0] == ")":
            last = groups.pop()
            groups = groups or [0]
            groups[-1] += last
        elif any(piece.groups()):
            groups[-1] += last * (_most(piece.groups("")) - 1)
            last *= _most(piece.groups(""))
        else:
            groups[-1] += 1
            last = 1
    return sum(groups)


def _most(counts: Sequence[str]) -> int:
    """Return the upper bound of a repetition, at least 1."""
    return max([1, *(int(count) for count in counts if count)])


def _is_short(number: Any) -> bool:
    """Return whether a number has few significant digits."""
    try:
        digits = Decimal(str(number)).normalize().as_tuple().digits
    except ArithmeticError:
        return False
    return int("".join(map(str, digits[:20])) or 0) <= MAX_REPEATS


def _require_bounded(grammar: Grammar, schema: Any) -> None:
    """Refuse a schema that would take long to compile, or that no answer can end."""
    properties, patterns = 0, list[Any]()
    text = json.dumps(schema)
    if len(text) > MAX_CHARACTERS:
        raise _invalid(grammar, f"it has {len(text)} characters as JSON, and at most {MAX_CHARACTERS} are read")
    for part, depth in _parts(schema):
        properties += len(part["properties"]) if isinstance(part.get("properties"), dict) else 0
        if depth > MAX_DEPTH or properties > MAX_PROPERTIES:
            raise _invalid(grammar, f"it has more than {MAX_DEPTH} levels, or {MAX_PROPERTIES} properties")
        if not _is_short(part.get("multipleOf", 1)):
            raise _invalid(grammar, f"multipleOf has more digits than {MAX_REPEATS}")
        keyed = part.get("patternProperties")
        patterns += [part.get("pattern"), *(keyed if isinstance(keyed, dict) else ())]
    _require_few_repeats(grammar, "\n".join(pattern for pattern in patterns if isinstance(pattern, str)))
    walk = _Ends(schema)
    if not walk.ends(schema):
        raise _invalid(grammar, "it requires itself, so no answer could end")
    if walk.steps > MAX_STEPS:
        raise _invalid(grammar, "its references to references are too many to follow")


def _parts(schema: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield every object of a schema with its depth."""
    left = [(schema, 0)]
    while left:
        part, depth = left.pop()
        if isinstance(part, dict):
            yield part, depth
        held = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        left += [(own, depth + 1) for own in held]


class _Ends:
    """Search of a schema for a finite value, along every reference, as llguidance follows them where it merges."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._above: list[str] = []  # references that are on the way
        self.steps = 0

    def ends(self, schema: Any) -> bool:
        """Return whether some value of a part of the schema is finite; True once that takes too long to tell."""
        self.steps += 1
        if not isinstance(schema, dict) or self.steps > MAX_STEPS or len(self._above) > MAX_DEPTH:
            return True
        every = [self.ends(own) for own in _required(schema)]
        for name in ("anyOf", "oneOf"):
            if isinstance(either := schema.get(name), list) and either:
                found = [self.ends(own) for own in either]  # all of them: their number is what takes long
                every.append(any(found))
        if isinstance(reference := schema.get("$ref"), str):
            every.append(reference not in self._above and self._reference_ends(reference))
        return all(every)

    def _reference_ends(self, reference: str) -> bool:
        self._above.append(reference)
        found = self.ends(_resolved(self._root, reference))
        self._above.pop()
        return found


def _required(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of what every value of a schema holds."""
    properties, required = schema.get("properties"), schema.get("required")
    known = properties if isinstance(properties, dict) else {}
    names = required if isinstance(required, list) else ()
    found: list[Any] = [known[name] for name in names if isinstance(name, str) and name in known]
    if isinstance(least := schema.get("minItems"), int) and least > 0:
        found.append(schema.get("items"))
    every = schema.get("allOf")
    return [*found, *(every if isinstance(every, list) else ())]


def _resolved(root: Any, reference: str) -> Any:
    """Return what a reference inside a schema leads to; True, any value, where llguidance will say what is wrong."""
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        with contextlib.suppress(KeyError, IndexError, ValueError, TypeError):
            found = found[int(name)] if isinstance(found, list) else found[name]
            continue
        return True
    return found if reference.startswith("#") else True


def _first_line(error: str) -> str:
    return error.partition("\n")[0] or "the token is not allowed"


def _invalid(grammar: Grammar, problem: str) -> ConfigError:
    line = " ".join(problem.removesuffix("<non-verbose/>").split())[:MAX_PROBLEM]
    return ConfigError(f"{grammar.field}: {line}", code=f"invalid_{grammar.kind}", field=grammar.field)
