"""Tasks in a row: what follows changes the shared weights, and never the head of an earlier task."""

from pathlib import Path

import pytest
import torch
from studies.conftest import setup_of

from loralab.adapters.folder import AdapterFolder
from loralab.adapters.methods import LoRA
from loralab.studies.measures.sequence import measure, with_head_of
from loralab.studies.study import Arm, Trial


def tasks_of(noise_file: Path, folder: Path, count: int) -> list[str]:
    """Write the same texts with labels of other names, so that each task has a head of its own."""
    text = noise_file.read_text(encoding="utf-8")
    files = [folder / f"{number}.csv" for number in range(count)]
    for number, file in enumerate(files):
        file.write_text(text.replace("positive", f"yes{number}").replace("negative", f"no{number}"), encoding="utf-8")
    return [str(file) for file in files]


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-9), ("full", 1e-12)])
def test_nothing_is_forgotten_where_nothing_moves(
    method: str, rate: float, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of("claim-28", tiny_bert_folder, noise_file, fields={"max_steps": 2, "batch_size": 4})
    arm = Arm(
        name="one",
        fields={"method": method, "learning_rate": rate},
        options={"tasks": tasks_of(noise_file, tmp_path, 3)},
    )
    found = measure(Trial(measure="m", setup=setup, arm=arm, seed=0), tmp_path / "own", lambda event: None)
    assert found.numbers["forgotten"] == 0
    assert [row["learnt"] for row in found.tables["tasks"]] == [row["kept"] for row in found.tables["tasks"]]
    assert found.numbers["learnt"] == pytest.approx(sum(row["learnt"] for row in found.tables["tasks"]) / 3)
    assert not list((tmp_path / "own").glob("task-*"))


def test_later_tasks_move_the_weights_that_all_share(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("claim-28", tiny_bert_folder, noise_file, fields={"max_steps": 12, "batch_size": 8})
    options = {"tasks": tasks_of(noise_file, tmp_path, 2)}
    arm = Arm(name="one", fields={"method": "lora", "learning_rate": 0.03}, options=options)
    found = measure(Trial(measure="m", setup=setup, arm=arm, seed=0), tmp_path / "own", lambda event: None)
    first, last = found.tables["tasks"]
    assert first["learnt"] != first["kept"]
    assert last["learnt"] == last["kept"]


def test_the_head_is_the_earlier_one_and_the_rest_is_the_last() -> None:
    def folder(value: float) -> AdapterFolder:
        keys = ("layer.0.query.lora_A.weight", "classifier.weight", "classifier.bias")
        tensors = {f"base_model.model.{key}": torch.full((2,), value) for key in keys}
        config = LoRA(modules_to_save=("classifier",))
        return AdapterFolder(path=Path(), config=config, tensors=tensors, fields={}, record={}, digest="")

    found = with_head_of(folder(1.0), folder(2.0))
    assert {key.split(".")[2]: float(tensor[0]) for key, tensor in found.items()} == {"layer": 2.0, "classifier": 1.0}
