"""Runs whose update is trained as an NF4 merge will round it: scores, resume, notes, what they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import llama

from loralab.adapters.folder import RECORD, TENSORS, read_json
from loralab.adapters.methods import IA3, AdaLoRA, Bottleneck, LoRA, Prefix
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.merge_aware import put_on_grid
from loralab.errors import ConfigError
from loralab.tasks.score import evaluate as score
from loralab.training.evaluation import evaluate
from loralab.training.plan import plan
from loralab.training.run import Run, train
from loralab.training.settings import Training

pytest.importorskip("bitsandbytes")
Train = Callable[..., Run]
OWN = {"precision": "bf16", "merge_aware": "nf4", "learning_rate": 0.01}


@pytest.fixture
def wide(save_tiny: Any) -> str:
    """Return a Llama of whole blocks."""
    return str(save_tiny("wide", llama(1, hidden_size=64, intermediate_size=128, vocab_size=100, eos_token_id=2), True))


def test_scores_of_a_run_are_those_of_its_merge(tiny_train: Train, wide: str, sums: Path) -> None:
    run = tiny_train(model=wide, **OWN)
    record = read_json(run.output_dir / RECORD)
    assert (record["training"]["merge_aware"], record["base"]["quantize"]) == ("nf4", "nf4")
    live = load_with_base(run.output_dir)

    def loss() -> float:
        base = live.base
        found = score(base.model, base.tokenizer, run.task, "validation", kind=base.kind, limit=200)
        return found.metrics["loss"]

    beside = loss()
    put_on_grid(live.adapter)
    trained = run.scores["validation"].metrics["loss"]
    assert abs(loss() - trained) < 0.1 * abs(beside - trained)
    shown = evaluate(data=str(sums), adapter=run.output_dir, evaluation=None)
    assert any("beside its base" in note for note in shown.notes)
    assert shown.metrics["loss"] == pytest.approx(beside, rel=5e-3)  # bfloat16 rounds otherwise from machine to machine


class Killed(BaseException):
    """Stands for a process that ends between two events."""


def test_a_killed_run_resumes_in_the_same_bytes(tiny_train: Train, wide: str) -> None:
    own = {**OWN, "model": wide, "save_every": 2, "evaluate_every": 3}
    whole = tiny_train("whole", **own)

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        tiny_train("cut", listener=kill, **own)
    resumed = tiny_train("cut", resume=True, **own)
    for name in (TENSORS, RECORD):
        assert (resumed.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "own", "code", "field"),
    [
        (IA3(), {}, "lora_only", "merge_aware"),
        (AdaLoRA(), {}, "lora_only", "merge_aware"),
        (Prefix(), {}, "lora_only", "merge_aware"),
        (Bottleneck(), {}, "lora_only", "merge_aware"),
        (LoRA(dora=True), {}, "no_merged_weight", "dora"),
        (LoRA(dropout=0.1), {}, "no_merged_weight", "dropout"),
        (LoRA(), {"quantize": "gguf"}, "other_grid", "merge_aware"),
        (LoRA(), {"shard_base": True}, "sharded_base", "merge_aware"),
        (LoRA(), {"merge_aware": "fp4"}, "invalid_choice", "merge_aware"),
    ],
    ids=str,
)
def test_what_cannot_is_refused_before_the_work(
    tiny_train: Train, tmp_path: Path, method: Any, own: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_train(method=method, **{**OWN, **own})
    assert (error.value.code, error.value.field) == (code, field)
    assert not (tmp_path / "run").exists()


def test_a_live_model_is_refused(live: Any, tokenizer: Any, sums: Path, tmp_path: Path) -> None:
    own = Training(merge_aware="nf4")
    with pytest.raises(ConfigError) as error:
        train(model=live, tokenizer=tokenizer, data=str(sums), output_dir=tmp_path / "run", training=own)
    assert (error.value.code, error.value.field) == ("live_model", "quantize")


def test_a_plan_says_whose_losses_it_means(wide: str, sums: Path) -> None:
    found = plan(model=wide, data=str(sums), training=Training(**OWN, max_steps=2, max_length=64))
    assert any("NF4 merge" in note for note in found.notes)
    assert {module.kind for module in found.modules} == {"QuantizedLinear"}
