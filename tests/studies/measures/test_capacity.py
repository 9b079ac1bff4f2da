"""Bits of random strings: none where the model guesses, all where it knows."""

import json
import math
from pathlib import Path

import pytest
from studies.conftest import setup_of

from loralab.errors import ConfigError
from loralab.studies.measures.capacity import MEASURE_CAPACITY, memorised_bits, random_rows
from loralab.studies.study import DONE, Arm, Trial
from loralab.studies.trained import measured


def test_a_guess_holds_nothing_and_knowledge_everything() -> None:
    assert memorised_bits(100 * math.log(32), 100, 32) == pytest.approx(0)
    assert memorised_bits(0.0, 100, 32) == pytest.approx(500)
    assert memorised_bits(100 * math.log(64), 100, 32) == pytest.approx(-100)


def test_a_trained_adapter_holds_some_of_what_it_has_seen(flat_llama_folder: Path, tmp_path: Path) -> None:
    data, general = tmp_path / "strings.jsonl", tmp_path / "general.jsonl"
    general.write_text('{"text": "a good film"}\n{"text": "a poor film"}\n', encoding="utf-8")
    rows = random_rows([" good", " bad", " fine", " poor"], 30, 6, seed=0)
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    fields = {"max_steps": 60, "learning_rate": 0.03, "modules_to_save": ["lm_head"]}
    few = {"train": 6, "validation": 5, "test": 5}
    setup = setup_of("grid", flat_llama_folder, data, rows=few, fields=fields, general=str(general))
    trial = Trial(measure=MEASURE_CAPACITY, setup=setup, arm=Arm(name="r=8", fields={"method": "lora"}), seed=0)
    record = measured(trial, tmp_path, lambda event: None)
    assert record.status == DONE, record.reason
    numbers = record.numbers
    assert (numbers["alphabet"], numbers["random_tokens"] % 6) == (4, 0)
    assert numbers["bits"] == pytest.approx(numbers["bits_per_parameter"] * numbers["parameters"])
    assert 0.2 * numbers["random_tokens"] < numbers["bits"] < 2 * numbers["random_tokens"]


def test_strings_are_drawn_for_a_run_that_brings_none(flat_llama_folder: Path, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "a good film"}\n{"text": "a poor film"}\n', encoding="utf-8")
    options = {"alphabet": [" good", " bad", " fine", " poor"], "strings": 30, "length": 6}
    setup = setup_of("grid", flat_llama_folder, general, fields={"max_steps": 2}, general=str(general))
    arm = Arm(name="r=8", fields={"method": "lora", "learning_rate": 1e-3}, options=options)
    record = measured(Trial(measure=MEASURE_CAPACITY, setup=setup, arm=arm, seed=3), tmp_path, lambda event: None)
    assert record.status == DONE, record.reason
    drawn = (tmp_path / "strings.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in drawn] == random_rows(options["alphabet"], 30, 6, seed=3)
    assert record.numbers["alphabet"] == 4


@pytest.mark.parametrize(("tokens", "alphabet"), [(0, 2), (5, 1)])
def test_what_holds_no_bits_is_refused(tokens: int, alphabet: int) -> None:
    with pytest.raises(ConfigError) as error:
        memorised_bits(1.0, tokens, alphabet)
    assert error.value.code == "invalid_value"


def test_rows_are_random_and_follow_from_the_seed() -> None:
    letters = [" a", " b", " c", " d"]
    rows = random_rows(letters, 50, 40, seed=1)
    assert rows == random_rows(letters, 50, 40, seed=1)
    assert rows != random_rows(letters, 50, 40, seed=2)
    assert len({row["prompt"] for row in rows}) == 50
    counts = ["".join(row["completion"] for row in rows).count(letter) for letter in letters]
    assert sum(counts) == 2000
    assert min(counts) > 400
