"""One step: accumulation, precision, checkpointing of activations, and what stops a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA
from loralab.errors import LearningError
from loralab.training.record import Event, read_metrics
from loralab.training.run import Run

Train = Callable[..., Run]


def weights(run: Run) -> dict[str, Tensor]:
    return run.adapter.state()


def difference(one: Run, other: Run) -> float:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("by_length", [True, False])
def test_accumulation_equals_the_big_batch_on_unequal_lengths(tiny_train: Train, by_length: bool) -> None:
    # one step, so that Adam's division by tiny gradients cannot blow rounding up
    big = tiny_train("big", batch_size=8, max_steps=1, by_length=by_length)
    runs = {8: big}
    for size in (4, 2, 1):
        runs[size] = tiny_train(
            f"small{size}", batch_size=size, accumulation_steps=8 // size, max_steps=1, by_length=by_length
        )
    losses = {s: read_metrics(r.output_dir)[0]["loss"] for s, r in runs.items()}
    norms = {s: read_metrics(r.output_dir)[0]["grad_norm"] for s, r in runs.items()}
    for size in (4, 2, 1):
        assert losses[size] == pytest.approx(losses[8], rel=1e-6)
        assert norms[size] == pytest.approx(norms[8], rel=1e-5)


@pytest.mark.parametrize("mode", ["on", "reentrant"])
def test_recomputed_activations_give_the_same_weights(tiny_train: Train, mode: str) -> None:
    plain = tiny_train("plain")
    saved = tiny_train("saved", gradient_checkpointing=mode)
    assert difference(plain, saved) < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_finite_and_learns_the_same(tiny_train: Train, precision: str) -> None:
    full = tiny_train("full", max_steps=20, learning_rate=0.01)
    half = tiny_train("half", max_steps=20, learning_rate=0.01, precision=precision)
    assert all(tensor.isfinite().all() for tensor in weights(half).values())
    assert all(tensor.dtype == torch.float32 for tensor in half.adapter.parameters())
    last = [read_metrics(r.output_dir)[19]["loss"] for r in (full, half)]
    assert last[1] == pytest.approx(last[0], rel=0.1)


def test_a_loss_that_is_not_finite_stops_and_names_the_layer(
    tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, checkpoints = LinearWithLoRA.forward, tmp_path / "run" / "checkpoints"

    def breaking(self: LinearWithLoRA, x: Tensor) -> Tensor:
        y = plain(self, x)
        return y * float("inf") if list(checkpoints.glob("step-*")) else y

    monkeypatch.setattr(LinearWithLoRA, "forward", breaking)
    with pytest.raises(LearningError) as error:
        tiny_train(save_every=1)
    assert (error.value.code, error.value.field) == ("loss_not_finite", "loss")
    assert list(checkpoints.glob("step-*"))


def test_a_module_without_gradient_stops_the_run(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LinearWithLoRA.forward

    def deaf(self: LinearWithLoRA, x: Tensor) -> Tensor:
        return self.base(x) if self.in_features != self.out_features else plain(self, x)

    monkeypatch.setattr(LinearWithLoRA, "forward", deaf)
    with pytest.raises(LearningError) as error:
        tiny_train()
    assert (error.value.code, error.value.field) == ("no_gradient", "model.layers.0.self_attn.k_proj.lora_A")


def test_weights_that_do_not_move_stop_the_run(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(LearningError) as error:
        tiny_train()
    assert (error.value.code, error.value.field) == ("not_moved", "model.layers.0.self_attn.q_proj.lora_B")


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tiny_train: Train, tmp_path: Path) -> None:
    import os
    import signal

    def interrupt(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_train(listener=interrupt, save_every=100)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    resumed = tiny_train(resume=True, save_every=100)
    assert difference(resumed, tiny_train("whole", save_every=100)) == 0


def test_only_the_adapter_has_gradients_while_training(tiny_train: Train) -> None:
    run = tiny_train()
    own = {id(p) for p in run.adapter.parameters()}
    trained = [p for p in run.base.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == own
    assert not any(isinstance(p, nn.UninitializedParameter) for p in trained)


def test_pissa_resumes_from_its_own_start(tiny_train: Train) -> None:
    method = LoRA(rank=2, init="pissa")
    whole = tiny_train("whole", method=method)

    def stop(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_train("cut", method=method, listener=stop, save_every=2)
    with pytest.raises(Exception) as error:
        tiny_train("cut", method=method, resume=True)
    assert (error.value.code, error.value.field) == ("other_settings", "save_every")
    assert difference(tiny_train("cut", method=method, resume=True, save_every=2), whole) == 0
