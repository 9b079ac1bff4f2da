"""What an error says to type is accepted, and leads to rows or to another question."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rowfiles import ASSISTANT, USER, proposed, table

from loralab.errors import DataError
from loralab.tasks.advice import mapping_option
from loralab.tasks.columns import checked_mapping

KINDS: dict[str, Any] = {  # what a column may hold: row -> value
    "text": lambda n: f"some text of number {n}",
    "class": lambda n: "ab"[n % 2],
    "whole": lambda n: n % 4,
    "amount": lambda n: n / 7,
    "truth": lambda n: n % 3 == 0,
    "spelt": lambda n: f"{n}.5",
    "none": lambda n: None,
    "blank": lambda n: "",
    "words": lambda n: ["a", "b"],
    "object": lambda n: {"a": n},
    "one": lambda n: 1,
    "split": lambda n: ("train", "test")[n % 2],
    "chat": lambda n: [USER, ASSISTANT],
    "weighed": lambda n: [USER, ASSISTANT | {"weight": n % 2, "name": "x", "thinking": "so"}],
    "shared": lambda n: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
}
NAMES = [
    "text",
    "label",
    "labels",
    "score",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "messages",
    "image",
    "text_a",
    "text_b",
    "tokens",
    "tags",
    "split",
    "conversations",  # canonical
    "id",
    "source",
    "created_at",
    "user_id",
    "sentiment",
    "stars",
    "score",
    "answer",
    "question",
    "tools",
    "weight",
    "system",
    "history",
    "chosen",
    "rejected",
    "audio",
    "train",
    "my column",
    "a,b",
    "a=b",
    "it's",
    '"quoted"',
    "a\\b",
    "--map",
    "x\ny",
    "影評",
    "$HOME",
    "#",
]
tables = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(sorted(KINDS)), min_size=1, max_size=6)
STEPS = 12  # questions until a table is read


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=tables, choice=st.randoms(use_true_random=False))
def test_what_an_error_proposes_leads_on(columns: dict[str, str], choice: Any, tmp_path: Path) -> None:
    rows = [{name: KINDS[kind](n) for name, kind in columns.items()} for n in range(24)]
    mapping: dict[str, str] = {}
    seen = set()
    for _ in range(STEPS):
        try:
            table(tmp_path, rows, mapping)
        except DataError as error:
            assert error.code and (error.code, error.field) not in seen, str(error)
            seen.add((error.code, error.field))
            ways = proposed(error)
            if not ways:
                return
            mapping = choice.choice(ways)
        else:
            return
    raise AssertionError(f"{STEPS} questions, at last with {mapping}")


names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)


@given(st.dictionaries(names, names | st.just(""), min_size=1, max_size=4))
def test_an_option_says_the_mapping(mapping: dict[str, str]) -> None:
    wanted = {name: own for name, own in mapping.items() if name != own}
    typed = mapping_option(mapping)
    if typed.startswith("--map") and wanted:
        error = DataError(f"say {typed} if so")
        assert proposed(error) == [wanted]
    elif wanted:
        assert eval(typed.removeprefix("mapping=").removesuffix(" in Python")) == wanted


def test_names_with_signs_can_be_typed(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "a,b=c": "xy"[n % 2]} for n in range(9)]
    for mapping in ({"label": "a,b=c"}, {"a,b=c": ""}):
        typed = DataError(f"say {mapping_option(mapping)} now")
        assert proposed(typed) == [mapping]
        assert table(tmp_path, rows, checked_mapping(mapping)).splits["train"]
