"""Labels that are coins: whatever is compared, trained and scored for real, nothing is claimed."""

from pathlib import Path

import pytest
from studies.conftest import Here, assert_it_renders, keys_in, setup_of

from loralab.studies.evidence import by_arm
from loralab.studies.prepare import question_module

# what does not hang on labels may well differ: the model before training, and times
APART = ("init.at_step_0", "methods.pass_")


@pytest.mark.parametrize("study", ["rank", "init", "targets", "scaling", "adaptive", "methods"])
def test_no_arm_is_better_at_guessing_coins(
    study: str, here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of(
        study, tiny_bert_folder, noise_file, seeds=1, quick=True, fields={"max_steps": 12, "learning_rate": 3e-3}
    )
    records = here(setup, tmp_path)
    assert len(by_arm(records)) > 1
    answer = question_module(study).conclude(records, setup)
    claims = [f for f in answer.findings if not any(key.startswith(APART) for key in keys_in(f.sentence))]
    assert claims
    assert [f.sentence for f in claims if f.holds] == []
    assert_it_renders(answer, study)
