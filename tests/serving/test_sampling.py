"""Greedy is the likeliest token; drawn tokens have the probabilities that were asked for."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper

from loralab.errors import ConfigError
from loralab.serving.request import Sampling
from loralab.serving.sampling import SamplerState, choose_tokens, filtered_probabilities, likeliest, to_readable

ROW = torch.tensor([1.0, 3.0, 2.0, 0.5, -1.0])


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(6, 30)
    draws = [SamplerState(Sampling(temperature=0)) for _ in range(6)]
    assert choose_tokens(logits, draws) == logits.argmax(dim=-1).tolist()


def test_a_seed_gives_the_same_tokens_whoever_else_is_in_the_batch() -> None:
    logits = torch.randn(40, 30)

    def drawn(others: int) -> list[int]:
        own = SamplerState(Sampling(seed=7))
        crowd = [SamplerState(Sampling(seed=n)) for n in range(others)]
        return [choose_tokens(torch.stack([row] * (others + 1)), [*crowd, own])[-1] for row in logits]

    assert drawn(0) == drawn(3)
    assert len(set(drawn(0))) > 5


@given(st.integers(0, 6), st.floats(0.05, 1.0), st.floats(0.2, 5.0))
def test_what_is_left_by_top_k_and_top_p(top_k: int, top_p: float, temperature: float) -> None:
    sampling = Sampling(top_k=top_k, top_p=top_p, temperature=temperature)
    chances = filtered_probabilities(ROW, sampling)
    plain = (ROW.double() / temperature).softmax(dim=0)
    assert float(chances.sum()) == pytest.approx(1)
    kept = chances > 0
    assert kept[1]  # the likeliest always stays
    assert int(kept.sum()) <= (top_k or len(ROW))
    if not top_k:
        assert float(plain[kept].sum()) >= top_p - 1e-9  # reaches it,
        rest = plain[kept].sort().values[1:].sum()
        assert float(rest) < top_p + 1e-9  # and needs the last one for it
    ratio = chances[kept] / plain[kept]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))


@given(
    st.lists(st.integers(-576, 576).map(lambda n: n / 64), min_size=1, max_size=40),
    st.integers(0, 50),
    st.floats(0.01, 1.0),
    st.floats(0.05, 20),
)
def test_the_same_is_left_as_by_sorting_all(logits: list[float], top_k: int, top_p: float, temperature: float) -> None:
    row = torch.tensor(logits)
    order = sorted(range(len(row)), key=lambda n: -row[n])[: top_k or None]
    chances = (row[order].double() / temperature).softmax(dim=0)
    before = chances.cumsum(dim=0) - chances
    assume(not (before - top_p).abs().lt(1e-9).any())
    chances[before >= top_p] = 0
    expected = torch.zeros(len(row), dtype=torch.double)
    expected[order] = chances / chances.sum()
    found = filtered_probabilities(row, Sampling(top_k=top_k, top_p=top_p, temperature=temperature))
    assert torch.allclose(found, expected, atol=1e-12)


@given(
    st.lists(st.integers(-576, 576).map(lambda n: n / 64), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
    st.floats(0.1, 5.0),
)
def test_min_p_leaves_what_transformers_leaves(logits: list[float], min_p: float, temperature: float) -> None:
    row = torch.tensor(logits, dtype=torch.double)
    reference = MinPLogitsWarper(min_p)(torch.empty(1, 0).long(), row[None] / temperature)[0].softmax(dim=0)
    found = filtered_probabilities(row, Sampling(min_p=min_p, temperature=temperature))
    assert torch.allclose(found, reference, atol=1e-12)


def test_top_p_counts_what_min_p_has_left() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = filtered_probabilities(row, Sampling(min_p=0.4, top_p=0.6))
    assert found.tolist() == pytest.approx([1, 0, 0, 0])  # 0.5 / 0.8 reaches it


def test_frequencies_are_the_probabilities() -> None:
    own = SamplerState(Sampling(seed=1, temperature=0.8))
    expected = filtered_probabilities(ROW, own.sampling)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[choose_tokens(ROW[None], [own])[0]] += 1
    assert torch.allclose(counts.double() / 4000, expected, atol=0.03)


def test_nothing_is_sorted_where_nothing_is_left_out() -> None:
    """A top_p that leaves out nothing gives the same tokens as none."""
    logits = torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
    plain, sorted_ = SamplerState(Sampling(seed=3)), SamplerState(Sampling(seed=3, top_k=200))
    assert [choose_tokens(row[None], [plain]) for row in logits] == [
        choose_tokens(row[None], [sorted_]) for row in logits
    ]


def test_rows_are_moved_together_and_only_if_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda own: (moved.append(own.shape), cpu(own))[1])
    logits = torch.randn(8, 30)
    for crowd, expected in (
        ([Sampling(temperature=0)] * 8, []),
        ([Sampling(seed=1)] * 8, [(8, 30)]),
        ([Sampling(temperature=0)] * 7 + [Sampling(temperature=0, logprobs=1)], [(8, 30)]),
    ):
        moved.clear()
        draws = [SamplerState(sampling) for sampling in crowd]
        assert len(choose_tokens(to_readable(logits, draws), draws)) == 8
        assert moved == expected


def test_log_probabilities() -> None:
    own, top = likeliest(ROW, 2, 2)
    whole = ROW.double().log_softmax(dim=0)
    assert own == pytest.approx(float(whole[2]))
    assert [token for token, _ in top] == [1, 2]
    assert likeliest(ROW, 0, 0)[1] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("logprobs", 21),
        ("stop", ("",)),
        ("seed", -1),
        ("max_tokens", True),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert error.value.code == "invalid_value"
