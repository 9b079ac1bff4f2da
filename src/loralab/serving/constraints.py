"""Structured answers: a grammar allows only some tokens at each step, whatever the model thinks of them.

llguidance compiles JSON schemas, regular expressions and grammars, and says which tokens may come
next. It computes that in a thread of its own, without Python's lock, while the model reads the
token before: nobody waits for another's mask. Needs the extra `serve`; where llguidance is missing,
asking for structure is an error that says so.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
        strict: refuse a schema with keywords that cannot be kept; else they are told of.
    """

    kind: str
    source: Any
    field: str
    strict: bool = True


class Constraint:
    """Structure of one answer: tokens that may come next, after those that came.

    Attributes:
        stopped: nothing can follow but the end.
        error: why no more can be said; empty as a rule.
    """

    def __init__(self, matcher: Any, pool: ThreadPoolExecutor, words: int) -> None:
        self._matcher, self._pool, self._words = matcher, pool, words
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
        allowed = np.unpackbits(bits, count=self._words, bitorder="little")
        return torch.from_numpy(allowed == 0)

    def note(self, token: int) -> None:
        """Take the token that came; what may follow is computed meanwhile."""
        if self.error:
            return
        if not self._matcher.consume_token(token):
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
        self._tokenizers: dict[tuple[int, ...], Any] = {}  # by the tokens that end an answer
        self._compiled: OrderedDict[tuple[Any, ...], Compiled] = OrderedDict()
        self._pool = ThreadPoolExecutor(2, "mask")

    @property
    def _words(self) -> int:
        """Return how many tokens have logits."""
        return int(self._base.model.get_output_embeddings().weight.shape[0])

    def compile(self, grammar: Grammar, stops: Iterable[int]) -> Compiled:
        """Return a grammar for answers that end with one of `stops`.

        Raises:
            ConfigError: it is too large or does not compile, llguidance is missing, or does not know the
                tokenizer.
        """
        lib = _library(grammar.field)
        text = _text_of(lib, grammar)
        ends = tuple(sorted(stops))
        key = (text, ends)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            limits = lib.LLParserLimits(verbose_errors=False, precompute_large_lexemes=False, **LIMITS)
            failed, problems = lib.LLMatcher.validate_grammar_with_warnings(text, None, limits=limits)
            if failed:
                raise _invalid(grammar, problems[0])
            matcher = lib.LLMatcher(self._tokenizer(lib, grammar.field, ends), text, log_level=0, limits=limits)
            matcher.compute_bitmask()
            if matcher.is_error() or matcher.is_stopped():
                raise _invalid(grammar, matcher.get_error() or "it allows nothing but an empty answer")
            self._compiled[key] = compiled = Compiled(matcher=matcher, warning=" ".join(problems)[:MAX_PROBLEM])
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return compiled

    def begin(self, compiled: Compiled) -> Constraint:
        """Return the structure of an answer that begins now."""
        return Constraint(compiled.matcher.deep_copy(), self._pool, self._words)

    def _tokenizer(self, lib: Any, field: str, stops: tuple[int, ...]) -> Any:
        if stops not in self._tokenizers:
            from llguidance.hf import from_tokenizer

            own = self._base.tokenizer
            try:
                words = max(len(own), self._words)
                self._tokenizers[stops] = from_tokenizer(own, n_vocab=words, eos_token=list(stops) or None)
            except Exception as error:  # a kind that it does not know
                raise ConfigError(
                    f"{field}: the tokenizer of {self._base.name} cannot be constrained: {str(error)[:MAX_PROBLEM]}",
                    code="unsupported_tokenizer",
                    field=field,
                ) from None
        return self._tokenizers[stops]


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
    if grammar.kind == JSON:
        _require_bounded(grammar)
        options: Any = {**OPTIONS, "lenient": not grammar.strict}
        return str(lib.LLMatcher.grammar_from_json_schema(json.dumps(source), overrides=options))
    if grammar.kind == CHOICE:
        if not 1 <= len(source) <= MAX_CHOICES or not all(source):
            raise _invalid(grammar, f"takes 1 to {MAX_CHOICES} texts, none of them empty")
        source = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in source)
    if len(source) > MAX_CHARACTERS:
        raise _invalid(grammar, f"it has {len(source)} characters, and at most {MAX_CHARACTERS} are read")
    if grammar.kind == REGEX:
        return str(lib.LLMatcher.grammar_from_regex(source))
    if grammar.kind == GRAMMAR and "::=" in source:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            source = any_to_lark(source)
        except Exception as error:  # of a parser by hand
            raise _invalid(grammar, str(error)) from None
    return str(lib.LLMatcher.grammar_from_lark(source))


def _require_bounded(grammar: Grammar) -> None:
    """Refuse a schema that would take long to compile, or that no answer can end."""
    schema, properties = grammar.source, 0
    text = json.dumps(schema)
    if len(text) > MAX_CHARACTERS:
        raise _invalid(grammar, f"it has {len(text)} characters as JSON, and at most {MAX_CHARACTERS} are read")
    for part, depth in _parts(schema):
        properties += len(part["properties"]) if isinstance(part.get("properties"), dict) else 0
        if depth > MAX_DEPTH or properties > MAX_PROPERTIES:
            raise _invalid(grammar, f"it has more than {MAX_DEPTH} levels, or {MAX_PROPERTIES} properties")
    if not _can_end(schema, schema, ()):
        raise _invalid(grammar, "it requires itself, so no answer could end")


def _parts(schema: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield every object of a schema with its depth."""
    left = [(schema, 0)]
    while left:
        part, depth = left.pop()
        if isinstance(part, dict):
            yield part, depth
        held = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        left += [(own, depth + 1) for own in held]


def _can_end(schema: Any, root: Any, above: tuple[str, ...]) -> bool:
    """Return whether some value of a schema is finite; references to `above` are on the way already."""
    if not isinstance(schema, dict):
        return True

    def ends(part: Any) -> bool:
        return _can_end(part, root, above)

    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in above:
            return False
        if not _can_end(_resolved(root, reference), root, (*above, reference)):
            return False
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        needed: list[Any] = [properties[name] for name in required if isinstance(name, str) and name in properties]
        if not all(map(ends, needed)):
            return False
    if isinstance(least := schema.get("minItems"), int) and least > 0 and not ends(schema.get("items")):
        return False
    either = [own for name in ("anyOf", "oneOf") if isinstance(own := schema.get(name), list) and own]
    every = schema.get("allOf")
    return all(any(map(ends, own)) for own in either) and all(map(ends, every if isinstance(every, list) else ()))


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
