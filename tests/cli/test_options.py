"""Options of name=value pairs, as they are typed and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.cli.options import pairs
from loralab.errors import ConfigError
from loralab.values import is_joinable, join_pairs

names = st.text(st.sampled_from("ab,=' \"x"), min_size=1, max_size=6).filter(is_joinable)


@given(values=st.dictionaries(names, names | st.just(""), min_size=1))
def test_what_is_joined_is_read_back(values: dict[str, str]) -> None:
    assert pairs(join_pairs(values), "map") == values


def test_a_pair_is_cut_at_its_last_sign_and_loses_spaces() -> None:
    assert pairs(" a = 1 ,b.*=c=2", "map") == {"a": "1", "b.*=c": "2"}
    assert pairs(r"a\=b=,c\,d=e", "map") == {"a=b": "", "c,d": "e"}
    assert pairs(r".*\.q_proj=4,k=8", "rank_pattern", int) == {r".*\.q_proj": 4, "k": 8}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a", "not_pairs"),
        ("=b", "not_pairs"),
        ("a=1,", "not_pairs"),
        ("", "not_pairs"),
        ("a=x", "not_pairs"),
        ("a=1,a=2", "given_twice"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pairs(text, "rank_pattern", int)
    assert (caught.value.code, caught.value.field) == (code, "rank_pattern")
