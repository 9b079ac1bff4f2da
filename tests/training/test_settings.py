"""Every wrong value is refused with its name."""

import pytest

from loralab.errors import ConfigError
from loralab.training.settings import Evaluation, Training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("epochs", 0),
        ("max_steps", 0),
        ("batch_size", -1),
        ("batch_size", 2.5),
        ("accumulation_steps", 0),
        ("max_length", 1),
        ("precision", "fp8"),
        ("schedule", "linaer"),
        ("warmup", 1.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", float("inf")),
        ("loss_on", "answers"),
        ("patience", 0),
        ("gradient_checkpointing", "yes"),
        ("save_every", 0),
        ("evaluate_every", 0),
        ("pass_tokens", 0),
        ("checkpoint_blocks", 0),
        ("checkpoint_blocks", 2),
        ("optimizer_bits", 16),
        ("memory_budget", "4"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        Training(**{name: value})  # type: ignore[arg-type]
    assert error.value.code and error.value.field == name


def test_the_nearest_choice_is_proposed() -> None:
    with pytest.raises(ConfigError) as error:
        Training(schedule="linaer")
    assert (error.value.code, error.value.field) == ("invalid_choice", "schedule")


@pytest.mark.parametrize(("name", "value"), [("split", "tset"), ("limit", 0), ("batch_size", 0)])
def test_a_wrong_evaluation_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        Evaluation(**{name: value})  # type: ignore[arg-type]
    assert error.value.code and error.value.field == name
