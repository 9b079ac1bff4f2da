"""Measures of claims in which nothing is drawn."""

from pathlib import Path
from typing import Any

import pytest
from studies.conftest import setup_of

from loralab.studies.claims.exact import count, gradients, nf4
from loralab.studies.claims.trained import measure
from loralab.studies.study import Arm, Record, Trial


def measured(how: Any, folder: Path, setup: Any, *, fields: Any = None, **options: Any) -> Record:
    found: Record = how(
        Trial(measure="m", setup=setup, arm=Arm(name="a", fields=fields or {}, options=options), seed=0), folder, print
    )
    return found


@pytest.mark.parametrize(("published", "missed"), [(393_216, 0), (350_000, 43_216)])
def test_parameters_are_counted_without_numbers(
    published: int, missed: int, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    setup = setup_of("claim-1", tiny_bert_folder, noise_file)
    found = measured(
        count,
        tmp_path,
        setup,
        published=published,
        architecture={"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
        method={"method": "lora", "rank": 4, "target_modules": ["c_attn.q", "c_attn.v"]},
    )
    assert found.numbers["missed"] == missed


@pytest.mark.parametrize("of", ["loss", "lora"])
def test_gradients_by_hand_are_those_of_autograd(
    of: str, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    setup = setup_of("claim-15", tiny_bert_folder, noise_file)
    found = measured(gradients, tmp_path, setup, of=of, tokens=300, width=32, outputs=70, rank=4)
    assert 0 <= found.numbers["relative"] < 1e-5


def test_bits_of_weights_in_nf4(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    pytest.importorskip("bitsandbytes")
    setup = setup_of("claim-10", tiny_bert_folder, noise_file)
    single = measured(nf4, tmp_path, setup, bits=4.5, double=False)
    assert single.numbers["relative"] < 1e-6
    levels = measured(nf4, tmp_path, setup, levels=[-1.0, *[0.0] * 14, 1.0])
    assert levels.numbers["relative"] > 0.5


def test_a_run_of_a_claim_holds_the_spectrum_of_its_update(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    setup = setup_of("claim-23", tiny_bert_folder, noise_file)
    found = measured(measure, tmp_path, setup, fields={"method": "lora", "rank": 4})
    assert 1 <= found.numbers["stable_rank"] <= found.numbers["effective_rank"] <= 4.0001
    assert 1 < found.numbers["gaussian_stable_rank"] < 4
    assert found.items["score"]
