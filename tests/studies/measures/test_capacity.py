"""Bits of random strings: none where the model guesses, all where it knows."""

import math

import pytest

from loralab.errors import ConfigError
from loralab.studies.measures.capacity import bits_per_parameter, memorised_bits, random_rows


def test_a_guess_holds_nothing_and_knowledge_everything() -> None:
    assert memorised_bits(100 * math.log(32), 100, 32) == pytest.approx(0)
    assert memorised_bits(0.0, 100, 32) == pytest.approx(500)
    assert memorised_bits(100 * math.log(64), 100, 32) == pytest.approx(-100)


def test_rows_count_by_their_tokens() -> None:
    probabilities = [[0.5, 0.25], [1.0], [0.125, 0.5, 0.5]]  # of the right token, of 8
    bits = sum(3 + math.log2(p) for row in probabilities for p in row)
    means = [-sum(map(math.log, row)) / len(row) for row in probabilities]
    assert bits_per_parameter(means, [2, 1, 3], 8, 10) == pytest.approx(bits / 10)


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
