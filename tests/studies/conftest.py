"""Studies without a worker: cells are measured in this process, on tiny models."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loralab.studies import store
from loralab.studies.prepare import prepare
from loralab.studies.runner import walk
from loralab.studies.study import Arm, Cell, Ground, Record
from loralab.studies.trained import measured

Here = Callable[[Ground, Path], list[Record]]


@pytest.fixture(scope="session")
def noise_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose labels are coins: nothing can be learnt that holds on other rows."""
    draw = random.Random(0)
    words = ["good", "bad", "fine", "poor", "great", "awful", "film", "the", "a"]
    lines = ["text,label"]
    for n in range(400):
        text = " ".join([str(n % 60), *draw.choices(words, k=4), str(n // 60)])
        lines.append(f"{text},{draw.choice(['positive', 'negative'])}")
    file = tmp_path_factory.mktemp("noise") / "noise.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def here() -> Here:
    """All records of a study, measured in this process."""

    def run(ground: Ground, folder: Path) -> list[Record]:
        arms, invalid, _ = prepare(ground, None)
        able = [Arm(**arm) for arm in arms if arm["name"] not in invalid]

        def obtain(cell: Cell) -> Record:
            place = store.place_of(folder, cell)
            if (stored := store.read(folder, cell)) is not None:
                return stored
            store.write(place, cell, measured(cell, place, lambda event: None), 0.1)
            found = store.read(folder, cell)
            assert found is not None
            return found

        store.add_plan(folder, (ground, able, invalid))
        return walk(ground, able, obtain)

    return run


def ground_of(study: str, model: Path, data: Path, **changes: object) -> Ground:
    """A tiny ground."""
    fields = {"max_steps": 6, "batch_size": 8, "precision": "fp32", "max_length": 64}
    fields |= changes.pop("fields", {})  # type: ignore[arg-type]
    given = {
        "seeds": 2,
        "rows": {"train": 48, "validation": 20, "test": 40},
        "fixed_lr": True,
        "rates": (1.0, 4.0),
        **changes,
    }
    return Ground(study=study, model=str(model), data=str(data), fields=fields, **given)


def planted(name: str, scores: Sequence[float], seeds: int = 3, **fields: object) -> list[Record]:
    """Records of an arm whose rows score like this for every seed, but for a little noise."""
    draw = random.Random(name)
    return [
        Record(
            arm=Arm(name=name, fields={"method": "lora", **fields}),
            seed=seed,
            rate=1e-3,
            numbers={
                "score": sum(scores) / len(scores),
                "parameters": 100.0,
                "step_seconds": 0.1,
                "peak_bytes": 1e9,
                "file_bytes": 1e5,
                "train_loss": 0.5,
                "validation_loss": 0.5,
                "test_loss": 0.5,
                "gap": 0.0,
            },
            items={"score": [s + draw.gauss(0, 0.01) for s in scores]},
            texts={"metric": "accuracy"},
            series={"loss": [1.0, 0.5]},
        )
        for seed in range(seeds)
    ]
