"""Times of two ways are compared turn by turn; a way that was not timed is refused."""

from pathlib import Path

import pytest
from studies.conftest import setup_of

from loralab.errors import ConfigError
from loralab.studies.claims.timed import batches, longer, passes
from loralab.studies.study import Arm, Trial

VARIANTS = {"LoRA": {"method": "lora", "rank": 2}, "bottleneck": {"method": "bottleneck", "width": 4}}


def test_a_slow_turn_slows_both() -> None:
    theirs = [1.0, 1.0, 5.0, 1.0, 1.0]
    assert longer([1.2 * own for own in theirs], theirs) == pytest.approx(20)
    assert longer(theirs, theirs) == pytest.approx(0)


def trial(model: Path, data: Path, **options: object) -> Trial:
    setup = setup_of("claim-4", model, data, fields={"max_steps": 2, "batch_size": 4, "precision": "fp32"})
    return Trial(measure="m", setup=setup, arm=Arm(name="one", options=options), seed=0)


def test_forward_passes_of_two_variants(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    ways = {"ours": ["bottleneck", "unmerged"], "theirs": ["LoRA", "merged"], "shape": [1, 16]}
    own = trial(tiny_bert_folder, noise_file, seconds=0.1, trials=6, variants=VARIANTS, **ways)
    found = passes(own, tmp_path, print).numbers
    assert found["trials"] == 6
    assert -100 < found["longer"] < 1000
    with pytest.raises(ConfigError) as refused:  # a bottleneck cannot be merged
        passes(
            trial(tiny_bert_folder, noise_file, variants=VARIANTS, **{**ways, "ours": ["bottleneck", "merged"]}),
            tmp_path,
            print,
        )
    assert (refused.value.code, refused.value.field) == ("wrong_way", "ours")


def test_batches_for_several_adapters(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    asked = {"adapters": [2, 4], "looped": [], "batches": [4], "seconds": 0.1, "trials": 6}
    found = batches(trial(tiny_bert_folder, noise_file, **asked, ours=4, theirs=2), tmp_path, print).numbers
    assert found["trials"] == 6
    assert -100 < found["longer"] < 1000
