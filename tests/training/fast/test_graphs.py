"""Graphs of packed passes compute what the passes do, or none is replayed; a stand-in replays kernel by kernel."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fill, llama
from torch import Tensor
from training.fast.test_flash import one_by_one

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import AdaLoRA, LoRA
from loralab.tasks.examples import IGNORED, Example
from loralab.training.fast import flash, forward_path, graphs
from loralab.training.fast.forward_path import ForwardPath, _graphs_of, fastest_path, gradient_of
from loralab.training.fast.graphs import PassGraphs, shape_of, static_rows
from loralab.training.memory import saved_bytes


def kernel(
    q: Tensor, k: Tensor, v: Tensor, one: Tensor, two: Tensor, most: int, least: int, **options: object
) -> Tensor:
    """Stand in for torch's, which computes in half precision on a GPU alone."""
    assert int(one.diff().max()) <= most
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return one_by_one(q, k, v, one, causal=True, scale=options["scale"])


kernel.__signature__ = flash.inspect.signature(  # type: ignore[attr-defined]
    lambda q, k, v, one, two, most, least, scale=None, window_size=None: None
)


class Stand:
    """Replays by running again, in half the time; what is launched while it records is lost."""

    def __init__(self, gain: float = 2.0, change: Callable[[], None] = lambda: None) -> None:
        self.gain, self.change, self.recorded, self.replayed = gain, change, 0, 0
        self._kept: list[Callable[[], None]] = []

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()
            self.change()

        self._kept.append(replay)
        return replay

    def seconds(self, run: Callable[[], None]) -> float:
        run()
        return 1.0 if run in self._kept else self.gain


def example(number: int, length: int, labelled: int) -> Example:
    draw = torch.Generator().manual_seed(number)
    ids = tuple(torch.randint(3, 40, (length,), generator=draw).tolist())
    return Example(number, ids, tuple(t if i >= length - labelled else IGNORED for i, t in enumerate(ids)))


def rows_of(*lengths: int, first: int = 0) -> list[Example]:
    return [example(first + i, length, max(1, length // 2)) for i, length in enumerate(lengths)]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> tuple[ForwardPath, Adapter, Stand]:
    monkeypatch.setattr(flash, "flash_kernel", lambda: kernel)
    adapter = attach(llama(), LoRA(rank=2), generator=torch.Generator().manual_seed(0))
    fill(adapter)
    found, stand = fastest_path(adapter, "causal-lm", pad_id=0), Stand()
    monkeypatch.setattr(forward_path, "PassGraphs", lambda *given: PassGraphs(*given, recorder=lambda: stand))
    monkeypatch.setattr(forward_path, "MAX_TRAINED_SHARE", 1.0)  # of a tiny model a small adapter is much
    found.graphs = _graphs_of(found, adapter)
    assert found.graphs is not None
    return found, adapter, stand


Path = tuple[ForwardPath, Adapter, Stand]


def both(path: ForwardPath, adapter: Adapter, rows: Sequence[Example]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Loss and gradient with graphs, and without."""
    plain = copy.copy(path)
    plain.graphs = None
    results = []
    for one in (path, plain):
        with one.activated():
            results.append(gradient_of(one.loss(rows), adapter))
    return tuple(results)


def require_alike(path: ForwardPath, adapter: Adapter, rows: Sequence[Example]) -> None:
    found, expected = both(path, adapter, rows)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def test_other_rows_of_a_shape_are_replayed_from_the_second_on(path: Path) -> None:
    own, adapter, stand = path
    for number, lengths in enumerate([(9, 4, 3), (8, 5, 3), (10, 3, 2), (16,)]):
        rows = rows_of(*lengths, first=10 * number)
        require_alike(own, adapter, rows)
    assert len({shape_of(rows_of(*lengths)) for lengths in [(9, 4, 3), (8, 5, 3), (10, 3, 2)]}) == 1
    assert (stand.recorded, stand.replayed) == (1, 1 + 2)  # one to be compared and timed


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 70), min_size=1, max_size=9))
def test_static_rows_hold_every_row_and_nothing_else_with_a_loss(lengths: list[int]) -> None:
    rows = rows_of(*lengths)
    shape = shape_of(rows)
    found = static_rows(rows, shape, pad_id=0)
    assert found.input_ids.shape == found.position_ids.shape == (1, shape.tokens)
    assert found.starts.shape == (shape.rows + 1,)
    assert found.starts.tolist()[: len(rows) + 1] == [sum(lengths[:i]) for i in range(len(rows) + 1)]
    assert int(found.starts[-1]) == shape.tokens
    assert int(found.starts.diff().max()) <= shape.longest
    assert int(found.starts.diff().min()) >= 0
    real = found.targets != IGNORED
    expected = [t for row in rows for t in row.labels[1:] if t != IGNORED]
    assert found.targets[real].tolist() == expected
    assert found.input_ids[0][found.predicting[real] + 1].tolist() == expected


def test_a_loss_keeps_its_gradient_while_others_are_computed(path: Path) -> None:
    own, adapter, _ = path
    with own.activated():
        for _ in range(2):
            own.loss(rows_of(9, 4, 3))
        losses = [own.loss(rows_of(8, 5, 3, first=7)), own.loss(rows_of(9, 4, 3, first=3))]
        together = gradient_of(losses[0] + 2 * losses[1], adapter)
    alone = [both(own, adapter, rows)[1] for rows in (rows_of(8, 5, 3, first=7), rows_of(9, 4, 3, first=3))]
    torch.testing.assert_close(together[1], alone[0][1] + 2 * alone[1][1], rtol=2e-4, atol=1e-5)


def test_a_change_of_the_model_is_not_replayed_past(path: Path) -> None:
    own, adapter, stand = path
    rows, seen = rows_of(9, 4, 3), []
    for _ in range(3):
        require_alike(own, adapter, rows)
    handle = own.model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    require_alike(own, adapter, rows)
    handle.remove()
    assert len(seen) == 2  # by either side
    parameter = adapter.parameters()[0]
    parameter.data = parameter.data.clone() + 1  # elsewhere
    before = stand.recorded
    for _ in range(2):
        require_alike(own, adapter, rows)
    assert stand.recorded == before + 1


def test_a_graph_that_computes_something_else_is_not_replayed(path: Path) -> None:
    own, adapter, stand = path
    assert own.graphs is not None
    stand.change = lambda: own.graphs._gradient[0].mul_(50)  # type: ignore[union-attr]
    for _ in range(4):
        require_alike(own, adapter, rows_of(9, 4, 3))
    assert own.graphs.refused
    assert (stand.recorded, stand.replayed) == (1, 1)


def test_a_graph_that_leaves_out_what_the_pass_computed_is_not_replayed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, adapter, stand = path
    monkeypatch.setattr(stand, "record", lambda run: lambda: None)
    for _ in range(4):
        require_alike(own, adapter, rows_of(9, 4, 3))
    assert own.graphs is not None
    assert own.graphs.refused


def test_one_that_is_not_quicker_is_not_replayed(path: Path) -> None:
    own, adapter, stand = path
    stand.gain = 1.05  # 30 tokens in 32
    for _ in range(4):
        require_alike(own, adapter, rows_of(10, 10, 10))
    assert (stand.recorded, stand.replayed) == (1, 1)
    assert own.graphs is not None
    assert own.graphs.refused == ""


def test_what_cannot_be_recorded_goes_on_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, adapter, stand = path

    def broken(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stand, "record", broken)
    for _ in range(3):
        require_alike(own, adapter, rows_of(9, 4, 3))
    assert own.graphs is not None
    assert "capturing" in own.graphs.refused


def test_what_a_pass_keeps_is_counted_without_graphs(path: Path) -> None:
    own, _, stand = path
    sizes = [saved_bytes(own, rows_of(9, 4, 3)) for _ in range(3)]
    assert sizes[0] > 0
    assert len(set(sizes)) == 1
    assert stand.recorded == 0


def test_few_graphs_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, adapter, stand = path
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    for length in (9, 40, 9):
        for _ in range(2):
            require_alike(own, adapter, rows_of(length))
    assert (stand.recorded, stand.replayed) == (1, 1 + 1 + 2)  # to be compared, then those of the first shape


def test_methods_that_change_between_steps_have_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_path, "MAX_TRAINED_SHARE", 1.0)
    monkeypatch.setattr(forward_path, "PassGraphs", lambda *given: PassGraphs(*given, recorder=Stand))
    for config, has in (
        (LoRA(rank=2), True),
        (LoRA(rank=2, dropout=0.1), False),
        (AdaLoRA(rank=2, target_rank=1), False),
    ):
        adapter = attach(llama(), config, generator=torch.Generator().manual_seed(0))
        fill(adapter)
        own = fastest_path(adapter, "causal-lm", pad_id=0)
        assert (_graphs_of(own, adapter) is not None) == has
