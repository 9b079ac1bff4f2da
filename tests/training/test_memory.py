"""Options that save memory change nothing else; a budget is kept, or refused with what is needed."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import TENSORS
from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError
from loralab.models import load as models
from loralab.tasks.examples import Example
from loralab.training import fit, memory
from loralab.training.fast.forward_path import MAX_TOKENS, ForwardPath, fastest_path
from loralab.training.record import read_metrics
from loralab.training.run import Run
from loralab.training.settings import Training
from loralab.values import parse_bytes

Train = Callable[..., Run]
LONG = [Example(n, tuple(range(3, 60)), tuple(range(3, 60))) for n in range(40)]


@pytest.fixture(autouse=True)
def this_process_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the peak of the tests before this one, which is not this run's."""
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 0)


@pytest.fixture
def prepared(deep_llama_folder: Path) -> tuple[Adapter, ForwardPath]:
    """Return an adapted tiny Llama and its packed path."""
    model = models.load(str(deep_llama_folder), kind="causal-lm").model
    adapter = attach(model, LoRA(rank=2))
    path = fastest_path(adapter, "causal-lm", pad_id=2)
    assert path.mode == "packed"
    return adapter, path


def curve(run: Run) -> list[float]:
    """Return the losses of all steps."""
    return [event["loss"] for event in read_metrics(run.output_dir) if event["kind"] == "step"]


@pytest.fixture(scope="module")
def usual_in(train_in: Train, deep_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return the run that saves nothing, of a precision; each is made once."""
    common = {"model": str(deep_llama_folder), "learning_rate": 0.01}
    return functools.cache(
        lambda precision: train_in(tmp_path_factory.mktemp("usual") / "run", precision=precision, **common)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"pass_tokens": 8},
        {"pass_tokens": 8, "gradient_checkpointing": "on"},
        {"gradient_checkpointing": "on", "checkpoint_blocks": 1},
        {"gradient_checkpointing": "reentrant", "checkpoint_blocks": 1},
        {"memory_budget": "50GB"},
        {"batch_size": 2, "accumulation_steps": 2, "pass_tokens": 16},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_saves_memory_changes_a_run_by_rounding_alone(
    tiny_train: Train, usual_in: Train, deep_llama_folder: Path, options: dict[str, Any], precision: str
) -> None:
    usual = usual_in(precision)
    common = {"model": str(deep_llama_folder), "precision": precision, "learning_rate": 0.01}
    saving = tiny_train("saving", **common, **options)
    within = 1e-5 if precision == "fp32" else 0.03
    assert curve(saving) == pytest.approx(curve(usual), rel=within)
    if precision == "fp32":
        expected = load_file(usual.output_dir / TENSORS)
        for name, tensor in load_file(saving.output_dir / TENSORS).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_only_the_first_blocks_are_recomputed(deep_llama_folder: Path) -> None:
    model = models.load(str(deep_llama_folder), kind="causal-lm").model
    memory.checkpoint_gradients(model, "on", 1)
    blocks = memory.checkpointed_blocks(model)
    assert [block.gradient_checkpointing for block in blocks] == [True, False]
    path = ForwardPath(model, "causal-lm", pad_id=0, max_tokens=7)
    drawn = torch.random.get_rng_state()
    with memory.trial(path):
        memory.checkpoint_first(model, 2)
        path.max_tokens = 9
        torch.rand(1)
    assert [block.gradient_checkpointing for block in blocks] == [True, False]
    assert path.max_tokens == 7
    assert torch.equal(torch.random.get_rng_state(), drawn)
    memory.checkpoint_gradients(model, "off")
    assert [block.gradient_checkpointing for block in blocks] == [False, False]


def test_what_bends_upwards_is_carried_on_as_a_parabola() -> None:
    assert memory._extended((1, 2), (3, 10), 4) == 36
    assert memory._extended((10, 20), (105, 205), 100) == 1005


def test_the_largest_part_is_not_that_of_the_longest_rows(prepared: tuple[Adapter, ForwardPath]) -> None:
    _, path = prepared
    rows = [Example(0, (3,) * n, (3,) * n) for n in (700, 700, 700, 500, 500, 500)]
    part = fit.largest_micro_batch(path, rows, Training(batch_size=3))
    assert [row.length for row in part] == [500, 500]


def test_more_blocks_than_there_are_is_refused(tiny_train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_train(gradient_checkpointing="on", checkpoint_blocks=3)
    assert (error.value.code, error.value.field) == ("too_many_blocks", "checkpoint_blocks")
    assert not (tmp_path / "run").exists()


def test_a_class_that_cannot_recompute_has_no_blocks_for_it(
    prepared: tuple[Adapter, ForwardPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = prepared[0].model
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert memory.checkpointed_blocks(model) == []
    with pytest.raises(ConfigError) as error:
        memory.checkpoint_gradients(model, "on")
    assert error.value.code == "checkpointing_unsupported"
    memory.checkpoint_gradients(model, "off")


def test_fewer_tokens_at_once_and_recomputed_blocks_keep_less(prepared: tuple[Adapter, ForwardPath]) -> None:
    adapter, path = prepared
    training = Training(batch_size=40)
    adapter.model.train()
    kept = {}
    for room in (1024, 256):
        path.max_tokens = room
        kept[room] = memory.saved_bytes(path, fit.largest_micro_batch(path, LONG, training))
    assert kept[256] < kept[1024] / 2.5
    memory.checkpoint_gradients(adapter.model, "on")
    assert memory.saved_bytes(path, fit.largest_micro_batch(path, LONG, training)) < kept[256] / 3


def test_what_many_rows_keep_is_extended_from_fewer(prepared: tuple[Adapter, ForwardPath]) -> None:
    adapter, path = prepared
    adapter.model.train()
    many = LONG * 3  # 6,840 tokens
    assert memory.kept_bytes(path, many) == pytest.approx(memory.saved_bytes(path, many), rel=0.05)


def test_a_budget_chooses_among_rooms_as_large_as_the_device_takes(
    prepared: tuple[Adapter, ForwardPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = prepared
    assert fit.max_tokens_choices(path) == [1024, 512, 256, 128]
    monkeypatch.setitem(MAX_TOKENS, "cpu", MAX_TOKENS["cuda"])
    assert fit.max_tokens_choices(path) == [16384, 8192, 4096, 2048, 1024, 512, 256, 128]


def test_a_prediction_for_a_gpu_says_what_it_rests_on() -> None:
    assert memory.caveats(torch.device("cpu")) == ()
    assert len(memory.caveats(torch.device("cuda"))) == 1


def test_a_budget_takes_the_quickest_that_fits(
    prepared: tuple[Adapter, ForwardPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, path = prepared
    monkeypatch.setattr(memory, "held_bytes", lambda device: 10**8)
    training = Training(batch_size=40)
    found = fit.settings(adapter, path, LONG, training, 0)
    assert {setting.blocks for setting in found} == {0, 1, 2}
    assert {setting.max_tokens for setting in found} == set(fit.max_tokens_choices(path))
    needs = sorted(setting.peak_bytes for setting in found)
    budget = (needs[0] + needs[-1]) / 2 / fit.BUDGET_SHARE
    tried: list[tuple[int, int]] = []

    def seconds(adapter: Adapter, path: ForwardPath, rows: list[Example], blocks: int) -> float:
        tried.append((path.max_tokens, blocks))
        # a token is quickest in a room of 256
        return (abs(path.max_tokens - 256) / 1000 + 1) * path.size(rows)

    monkeypatch.setattr(fit, "_seconds", seconds)
    chosen = fit.fit_to_budget(adapter, path, LONG, Training(batch_size=40, memory_budget=f"{budget / 1e6}MB"))
    fits = [setting for setting in found if setting.peak_bytes <= budget * fit.BUDGET_SHARE]
    assert 0 < len(fits) < len(found)
    fewest = {room: min(s.blocks for s in fits if s.max_tokens == room) for room, _ in tried}
    assert dict(tried) == fewest  # nothing that does not fit is run, and nothing recomputed in vain
    assert (chosen.pass_tokens, chosen.checkpoint_blocks or 0) == (256, fewest[256])
    assert path.max_tokens == 256


def test_a_budget_that_nothing_fits_says_what_the_least_is(tiny_train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_train(memory_budget="1MB")
    assert (error.value.code, error.value.field) == ("over_budget", "memory_budget")
    assert not (tmp_path / "run").exists()


def test_a_budget_below_what_loading_took_says_so(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 10**15)
    with pytest.raises(ConfigError) as error:
        tiny_train(memory_budget="1MB")
    assert (error.value.code, error.value.field) == ("over_budget", "memory_budget")


def test_a_run_with_a_budget_goes_on_as_it_began(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_train("whole", memory_budget="50GB", save_every=2)
    settings = (whole.output_dir / "config.toml").read_text()
    assert 'memory_budget = "50GB"' in settings
    assert "pass_tokens" in settings

    def other(*arguments: object) -> Training:
        raise AssertionError("chosen again")

    monkeypatch.setattr(fit, "settings", other)  # a slower machine might choose otherwise
    tiny_train("whole", memory_budget="50GB", save_every=2, resume=True)
    assert (whole.output_dir / "config.toml").read_text() == settings


def test_8_bit_moments_learn_the_same_and_resume_in_the_same_bytes(tiny_train: Train, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {
        "learning_rate": 0.01,
        "method": LoRA(rank=128, target_modules=["down_proj"]),
        "save_every": 3,
    }
    usual = tiny_train("usual", **options)
    few = tiny_train("few", optimizer_bits=8, **options)
    assert curve(few) == pytest.approx(curve(usual), rel=0.02)

    class Killed(BaseException):
        """The process ends here."""

    def kill(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        tiny_train("killed", optimizer_bits=8, listener=kill, **options)
    tiny_train("killed", optimizer_bits=8, resume=True, **options)
    assert (tmp_path / "killed" / TENSORS).read_bytes() == (few.output_dir / TENSORS).read_bytes()


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), (" 1.5 gb", 15 * 10**8), ("800MB", 8 * 10**8)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("memory_budget", text) == size


@pytest.mark.parametrize("text", ["4", "GB", "-1GB", "4 parsecs", "nanGB", "infGB", "4GiB", "1e300GB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Training(memory_budget=text)
    assert (error.value.code, error.value.field) == ("invalid_size", "memory_budget")
