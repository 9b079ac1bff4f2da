"""Messages name the nearest valid choice; classes fit what a caller expects."""

import pickle

import pytest

from loralab import errors
from loralab.errors import InputError, RunError, join_limited, nearest


def test_the_nearest_names_are_proposed() -> None:
    assert nearest("q_porj", ["q_proj", "k_proj", "xyz"]) == "; did you mean q_proj, k_proj?"
    assert nearest("zzz", ["q_proj"]) == ""


def test_a_long_list_is_cut_and_counted() -> None:
    assert join_limited("abcd", 2) == "a, b and 2 more"
    assert join_limited("ab", 2) == "a, b"


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("TargetError", ValueError),
        ("OutputError", OSError),
        ("AdapterStateError", RuntimeError),
        ("CertificateError", RuntimeError),
    ],
)
def test_an_error_is_also_what_a_caller_would_catch(name: str, builtin: type) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, builtin)
    assert issubclass(kind, InputError | RunError)


def test_an_error_carries_a_code_and_a_field_also_through_a_pickle() -> None:
    for kind in (errors.DataError, errors.OutputError):
        error = pickle.loads(pickle.dumps(kind("x is wrong", code="unknown_column", field="x")))
        assert (str(error), error.code, error.field) == ("x is wrong", "unknown_column", "x")
