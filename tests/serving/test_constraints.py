"""Whatever the logits are, a structured answer parses and fits what was asked for."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.conftest import World
from serving.vocabularies import byte_level

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.serving.constraints import CHOICE, GRAMMAR, JSON, REGEX, Constraints, Grammar
from loralab.serving.logits import LogitsProcessor
from loralab.serving.request import Sampling
from loralab.serving.sampling import SamplerState, choose_tokens
from loralab.serving.text_engine import TextEngine

Open = Callable[..., TextEngine]
END = 2


class _Head:
    """All that is asked of a model here: how many tokens it has logits of."""

    def __init__(self, words: int) -> None:
        self.weight = torch.empty(words, 1)

    def get_output_embeddings(self) -> "_Head":
        return self


TOKENIZER = byte_level()
WORDS = len(TOKENIZER) + 5  # more logits than tokens, as of a padded head
KNOWN = Constraints(Base(name="tiny", model=_Head(WORDS), tokenizer=TOKENIZER, kind="causal-lm", source=""))


def written(grammar: Grammar, logits: Callable[[torch.Generator], torch.Tensor], seed: int, most: int = 400) -> Any:
    """Return the text that some logits generate, and whether it came to an end."""
    constraint = KNOWN.begin(KNOWN.compile(grammar), [END])
    own = Sampling(temperature=1, seed=seed, max_tokens=most)
    state = SamplerState(own, LogitsProcessor(own, constraint=constraint))
    draw, tokens = torch.Generator().manual_seed(seed), list[int]()
    while len(tokens) < most and not constraint.stopped:
        tokens += choose_tokens(logits(draw)[None], [state])
        assert not constraint.error
    ended = constraint.stopped
    return TOKENIZER.decode([t for t in tokens if t != END], clean_up_tokenization_spaces=False), ended


def noise(draw: torch.Generator) -> torch.Tensor:
    row = 3 * torch.randn(WORDS, generator=draw)
    closing = TOKENIZER.convert_tokens_to_ids(['"', "}", "]", ","])
    row[[END, *closing]] += 4  # or texts without a limit hardly ever end
    return row


def odd(draw: torch.Generator) -> torch.Tensor:
    """Numbers that no model should give: none may matter."""
    row = noise(draw)
    row[torch.rand(WORDS, generator=draw) < 0.3] = torch.nan
    row[torch.rand(WORDS, generator=draw) < 0.3] = -torch.inf
    row[torch.rand(WORDS, generator=draw) < 0.1] = torch.inf
    return row


LEAVES = st.sampled_from(
    [
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-f]{1,3}-[0-9]$"},
        {"type": "string", "enum": ["red", "grün", 'qu"ote']},
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"const": {"a": [1, "x"]}},
        {"type": "string", "format": "date"},
    ]
)


def _composed(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from(["a", "b c", "ü", "d"]), children, min_size=1, max_size=3)
    objects = named.flatmap(
        lambda own: st.builds(
            lambda needed: {"type": "object", "properties": own, "required": needed, "additionalProperties": False},
            st.lists(st.sampled_from(sorted(own)), unique=True),
        )
    )
    arrays = st.builds(
        lambda own, n: {"type": "array", "items": own, "minItems": n, "maxItems": n + 2}, children, st.integers(0, 2)
    )
    return objects | arrays | st.builds(lambda a, b: {"anyOf": [a, b]}, children, children)


SCHEMAS = st.recursive(LEAVES, _composed, max_leaves=5)


@settings(deadline=None, max_examples=60)
@given(SCHEMAS, st.integers(0, 10**6), st.sampled_from([noise, odd]))
def test_every_answer_parses_and_validates(schema: Any, seed: int, logits: Any) -> None:
    text, ended = written(Grammar(kind=JSON, source=schema, field="f"), logits, seed)
    if ended:
        jsonschema.validate(json.loads(text), schema)


def test_answers_come_to_an_end() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    ends = [written(Grammar(kind=JSON, source=schema, field="f"), noise, seed)[1] for seed in range(10)]
    assert all(ends)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([r"[a-c]{2,5}", r"([0-9]{3}-){2}x", r"(yes|no)( maybe)?", r"ü{1,3}"]), st.integers(0, 10**6))
def test_a_regular_expression_is_matched(pattern: str, seed: int) -> None:
    text, ended = written(Grammar(kind=REGEX, source=pattern, field="f"), odd, seed)
    assert ended
    assert re.fullmatch(pattern, text)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("abü\"\\\n'{", min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 10**6))
def test_one_of_the_choices_is_taken(choices: list[str], seed: int) -> None:
    text, ended = written(Grammar(kind=CHOICE, source=choices, field="f"), odd, seed)
    assert ended
    assert text in choices


@pytest.mark.parametrize(
    "grammar", ['start: "<" (A | B)+ ">"\nA: "a"\nB: "b"', 'root ::= "<" [ab]+ ">"'], ids=["lark", "gbnf"]
)
def test_a_grammar_is_followed(grammar: str) -> None:
    def noise_with_ends(draw: torch.Generator) -> torch.Tensor:
        row = noise(draw)
        row[TOKENIZER.convert_tokens_to_ids([">"])] += 3
        return row

    text, ended = written(Grammar(kind=GRAMMAR, source=grammar, field="f"), noise_with_ends, 3)
    assert ended
    assert re.fullmatch("<[ab]+>", text)


DEEP: Any = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
WRONG: list[tuple[str, Any]] = [
    (JSON, {"type": "objec"}),
    (JSON, {"$ref": "#"}),
    (JSON, {"$ref": "http://localhost/x"}),
    (JSON, {"$ref": "#/$defs/none"}),
    (JSON, {"not": {"type": "string"}}),
    (JSON, {"type": "integer", "minimum": 3, "maximum": 1}),
    (JSON, {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"c": {"$ref": "#/$defs/a"}}, "required": ["c"]}}}),
    (JSON, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    (JSON, {"type": "object", "properties": {f"p{n}": {} for n in range(1000)}}),
    (JSON, {"enum": ["x" * 30_000]}),
    (JSON, {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(4)]} for i in range(8)]}),
    (JSON, {"type": "string", "pattern": "(?=a)b"}),
    (JSON, DEEP),
    (REGEX, "["),
    (REGEX, r"(a)\1"),
    (REGEX, "a" * 30_000),
    (REGEX, ".*" * 200),
    (CHOICE, []),
    (CHOICE, ["a", ""]),
    (CHOICE, ["x"] * 2000),
    (JSON, {"type": "integer", "multipleOf": 1234567}),
    (JSON, {"type": "string", "pattern": "(ab){4294967295}"}),
    (JSON, {"type": "object", "patternProperties": {"(ab){5000}": {}}}),
    (REGEX, "(ab){4294967295}"),
    (REGEX, "((ab){1,1000000})"),
    (REGEX, "(((a{900}){900}){900}){900}"),
    (REGEX, "a{900}" * 2000),
    (JSON, {"properties": {f"{n}": {"type": "string", "pattern": "(a{900}){300}"} for n in range(9)}}),
    (GRAMMAR, 'start: A{900}\nA: B{900}\nB: "a"{900}'),
    (GRAMMAR, 'start: %json {"multipleOf": 1234567}'),
    (GRAMMAR, 'start: %json {"multiple\\u004ff": 1234567}'),
    (GRAMMAR, "start: /(ab){5000}/"),
    (GRAMMAR, "start: foo"),
    (GRAMMAR, "start: start"),
    (GRAMMAR, "root ::= foo"),
    (GRAMMAR, ""),
]


@pytest.mark.parametrize(("kind", "source"), WRONG)
def test_what_cannot_be_kept_is_refused_by_its_field(kind: str, source: Any) -> None:
    with pytest.raises(ConfigError) as error:
        KNOWN.compile(Grammar(kind=kind, source=source, field="the.field"))
    assert (error.value.field, error.value.code) == ("the.field", f"invalid_{kind}")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["[0-9a-f]{8}(-[0-9a-f]{4}){3}", r"([0-9]{1,3}\.){3}[()]{0,2}\(x{2}\)", "(.{500}x){500}"]
)
def test_bounded_repetitions_are_taken(source: str) -> None:
    assert not KNOWN.compile(Grammar(kind=REGEX, source=source, field="f")).warning


def test_references_that_double_are_refused() -> None:
    """Two by two they are more than anybody can follow."""
    parts: dict[str, Any] = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**parts, "a40": {"enum": ["x"]}}}
    with pytest.raises(ConfigError) as error:
        KNOWN.compile(Grammar(kind=JSON, source=schema, field="f"))
    assert error.value.code == "invalid_schema"


def test_a_recursive_schema_that_can_end_is_taken() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    text, ended = written(Grammar(kind=JSON, source=schema, field="f"), noise, 5)
    assert ended
    jsonschema.validate(json.loads(text), schema)


def test_what_a_loose_schema_does_not_keep_is_told() -> None:
    loose = Grammar(kind=JSON, source={"type": "array", "uniqueItems": True}, field="f", strict=False)
    assert "uniqueItems" in KNOWN.compile(loose).warning
    assert KNOWN.compile(Grammar(kind=JSON, source={"type": "array"}, field="f")).warning == ""


def test_min_tokens_and_bias_do_not_break_a_structure() -> None:
    grammar = Grammar(kind=CHOICE, source=["ab"], field="f")
    own = Sampling(temperature=0, min_tokens=9, logit_bias={END: 100.0}, max_tokens=9)
    constraint = KNOWN.begin(KNOWN.compile(grammar), [END])
    state = SamplerState(own, LogitsProcessor(own, ends=[END, *range(3, 300)], constraint=constraint))
    tokens = []
    while not constraint.stopped:
        tokens += choose_tokens(torch.zeros(1, WORDS), [state])
    assert TOKENIZER.decode(tokens) == "ab"


@pytest.mark.parametrize("stops", [[END], [7], [END, 7]])
def test_an_answer_ends_with_its_own_stops_alone_and_never_before(stops: list[int]) -> None:
    """Adapters may end their answers in another way than the base, on the same tables."""
    structure = KNOWN.compile(Grammar(kind=REGEX, source="[a-c]{3}d?", field="f"))
    constraint = KNOWN.begin(structure, stops)
    state = SamplerState(Sampling(temperature=0), LogitsProcessor(Sampling(temperature=0), constraint=constraint))
    row = torch.zeros(1, WORDS)
    row[0, [END, 7]] = torch.tensor([9.0, 10.0])
    tokens = [choose_tokens(row, [state])[0] for _ in range(3)]
    assert not {END, 7} & {*tokens}
    assert not constraint.stopped
    assert choose_tokens(row, [state]) == stops[-1:]
    assert constraint.stopped


def test_in_a_mixed_batch_neighbours_write_what_they_write_alone(opened: Open, byte_world: World) -> None:
    engine, prompt = opened(of=byte_world), [5, 9, 31, 7]
    plain = Sampling(max_tokens=20, temperature=0)
    names = [None, "lora", "dora", "prefix"]
    alone = engine.generate([prompt] * 4, adapters=names, sampling=plain)
    grammar = Grammar(kind=REGEX, source="(good|bad)( film)?", field="f")
    structured = []
    answers = []
    for name in names:
        answers.append(engine.submit(prompt, adapter=name, sampling=plain))
        structure = engine.compile(grammar)
        structured.append(engine.submit(prompt, adapter=name, sampling=plain, structure=structure))
    engine.run_until_idle()
    assert [answer.result().tokens for answer in answers] == [own.tokens for own in alone]
    for answer in structured:
        done = answer.result()
        assert re.fullmatch("(good|bad)( film)?", done.text)
        assert done.finished.reason == "stop"


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError) as error:
        Constraints(world.base).compile(Grammar(kind=JSON, source={}, field="f"))
    assert (error.value.code, error.value.field) == ("missing_extra", "f")
