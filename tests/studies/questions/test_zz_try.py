from pathlib import Path
from loralab.studies.prepare import question_module
from studies.conftest import Here, ground_of
import pytest

@pytest.mark.parametrize("study", ["init", "adaptive"])
def test_try(study, tiny_bert_folder: Path, noise_file: Path, here: Here, tmp_path: Path):
    g = ground_of(study, tiny_bert_folder, noise_file)
    found = here(g, tmp_path)
    a = question_module(study).conclude(found, g)
    for r in found: print(r.arm.name, r.seed, r.status, r.reason, dict(r.numbers), {k: list(v)[:7] for k,v in r.series.items()})
    print(a.sentence); 
    for f in a.findings: print(f)
    for b in a.blanks: print(b)
    for t in a.tables:
        for row in t.rows: print(row)
