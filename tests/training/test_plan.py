"""plan(): what train would do, without doing it."""

from pathlib import Path

import pytest

from loralab.adapters.methods import LoRA
from loralab.errors import TargetError
from loralab.training import memory
from loralab.training.plan import plan
from loralab.training.settings import Training

TRAINING = Training(precision="fp32", batch_size=4, max_steps=6, max_length=64)


def test_it_lists_what_would_be_trained(tiny_llama_folder: Path, sums: Path) -> None:
    found = plan(
        model=str(tiny_llama_folder), data=str(sums), training=TRAINING,
        method=LoRA(rank=2, modules_to_save=["lm_head"]),
    )  # fmt: skip
    assert found.trainable == sum(module.parameters for module in found.modules)
    assert [m.rank for m in found.modules] == [2] * 14 + [None]
    assert found.steps == 6
    assert found.to_json()["share"] == pytest.approx(found.trainable / found.total)
    assert found.peak_bytes > 0
    assert found.seconds > 0


def test_longer_batches_need_more_memory(
    tiny_llama_folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 0)  # that of earlier tests
    monkeypatch.setattr(memory, "held_bytes", lambda device: 0)
    sizes = [
        plan(model=str(tiny_llama_folder), data=str(sums),
             training=Training(precision="fp32", batch_size=size, max_steps=1)).peak_bytes
        for size in (1, 40)
    ]  # fmt: skip
    assert sizes[1] > sizes[0]


def test_what_would_lower_the_peak_is_said_the_best_first(
    tiny_llama_folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 0)
    monkeypatch.setattr(memory, "held_bytes", lambda device: 10**6)
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    settings = {"precision": "fp32", "batch_size": 60, "max_steps": 1}
    found = plan(model=str(tiny_llama_folder), data=str(sums), training=Training(**settings))
    assert {"--gradient-checkpointing on", "--pass-tokens 256"} <= found.smaller.keys()
    assert list(found.smaller.values()) == sorted(found.smaller.values())
    assert all(peak < found.peak_bytes for peak in found.smaller.values())
    settings |= {"gradient_checkpointing": "on", "pass_tokens": 256}
    less = plan(model=str(tiny_llama_folder), data=str(sums), training=Training(**settings))
    assert less.peak_bytes < min(found.smaller.values())
    assert not {"--gradient-checkpointing on", "--pass-tokens 256"} & less.smaller.keys()


def test_what_train_would_refuse_it_refuses(tiny_llama_folder: Path, sums: Path) -> None:
    with pytest.raises(TargetError, match="did you mean q_proj"):
        plan(
            model=str(tiny_llama_folder), data=str(sums), method=LoRA(target_modules=["q_porj"]),
            training=TRAINING,
        )  # fmt: skip
