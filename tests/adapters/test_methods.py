"""Wrong values are named; patterns decide per module."""

from typing import Any

import pytest

from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -1),
        ("rank", 2.5),
        ("rank", True),
        ("alpha", 0),
        ("alpha", "x"),
        ("alpha", float("nan")),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init", "kaimign"),
        ("scaling", "alpha"),
        ("target_modules", []),
        ("target_modules", [3]),
        ("target_modules", "("),
        ("target_modules", 7),
        ("layers", [-1]),
        ("layers", []),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": -1}),
        ("rank_pattern", {"(": 3}),
        ("modules_to_save", [""]),
        ("layers_pattern", ["h"]),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        LoRA(**{field: value})
    named = (error.value.field or "").partition("[")[0]
    assert named in (field, "target_modules")  # an expression is one of targets
    assert (error.value.code == "invalid_expression") == (value in ("(", {"(": 3}))


def test_the_nearest_start_is_proposed() -> None:
    with pytest.raises(ConfigError) as error:
        LoRA(init="kaimign")
    assert (error.value.code, error.value.field) == ("invalid_choice", "init")


def test_lists_become_tuples_and_a_name_a_list_of_one() -> None:
    assert LoRA(target_modules=["q", "v"]).target_modules == ("q", "v")
    assert LoRA(target_modules="q_proj").target_modules == ("q_proj",)
    assert LoRA(target_modules="mlp").target_modules == "mlp"
    assert LoRA(target_modules=r".*\.q_proj").target_modules == r".*\.q_proj"


def test_patterns_give_a_module_its_own_rank_and_alpha() -> None:
    config = LoRA(rank=8, alpha=16, rank_pattern={"q_proj": 4, "layers.0.*v_proj": 2}, alpha_pattern={"v_proj": 1})
    q, v0, v1 = (config.for_module(f"model.layers.{n}") for n in ("0.a.q_proj", "0.a.v_proj", "1.a.v_proj"))
    assert [(c.rank, c.alpha) for c in (q, v0, v1)] == [(4, 16), (2, 1), (8, 1)]


@pytest.mark.parametrize(("scaling", "factor"), [("alpha/r", 4.0), ("alpha/sqrt(r)", 8.0), ("none", 1.0)])
def test_the_three_scalings(scaling: str, factor: float) -> None:
    assert LoRA(rank=4, alpha=16, scaling=scaling).factor == factor
