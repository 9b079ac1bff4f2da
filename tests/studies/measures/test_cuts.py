"""One threshold for all layers keeps more of the update than equal ranks, with as many numbers."""

import itertools
from pathlib import Path

import torch
from studies.conftest import setup_of

from loralab.studies.measures.cuts import CUT, GLOBAL, MEASURE_GLOBAL, global_ranks, truncated
from loralab.studies.study import DONE, Arm, Trial
from loralab.studies.trained import measured

SPECTRA = {"a": torch.tensor([9.0, 5.0, 1.0]), "b": torch.tensor([4.0, 3.0, 2.0]), "c": torch.tensor([0.5, 0.0, 0.0])}
SAME = dict.fromkeys(SPECTRA, 10)


def kept(ranks: dict[str, int]) -> float:
    return sum(float(SPECTRA[name][:rank].square().sum()) for name, rank in ranks.items())


def test_the_largest_values_of_all_layers_stay() -> None:
    assert global_ranks(SPECTRA, SAME, 40) == {"a": 2, "b": 2, "c": 0}
    assert global_ranks(SPECTRA, SAME, 69) == {"a": 3, "b": 3, "c": 0}
    assert global_ranks(SPECTRA, SAME, 1000) == {"a": 3, "b": 3, "c": 1}  # a zero holds nothing
    assert global_ranks(SPECTRA, SAME, 9) == {"a": 0, "b": 0, "c": 0}


def test_where_layers_cost_alike_no_other_ranks_keep_more() -> None:
    for directions in range(8):
        found = global_ranks(SPECTRA, SAME, 10 * directions)
        others = (dict(zip(SPECTRA, own, strict=True)) for own in itertools.product(range(4), repeat=3))
        assert kept(found) == max(kept(own) for own in others if sum(own.values()) <= directions)


def test_it_is_a_threshold_and_within_the_budget() -> None:
    costs = {"a": 30, "b": 10, "c": 5}
    for budget in range(0, 150, 7):
        ranks = global_ranks(SPECTRA, costs, budget)
        assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
        inside = [float(v) for name, rank in ranks.items() for v in SPECTRA[name][:rank]]
        outside = [float(v) for name, rank in ranks.items() for v in SPECTRA[name][rank:]]
        assert min(inside, default=10) >= max(outside, default=0)


def test_a_layer_of_rank_zero_is_cut_to_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 6, generator=draw), torch.randn(5, 4, generator=draw)
    cut = truncated(A, B, 0)
    assert not any(factor.any() for factor in cut)
    assert [factor.shape for factor in cut] == [A.shape, B.shape]


def test_both_cuts_are_scored_with_no_more_numbers(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("rank", tiny_bert_folder, noise_file, fields={"max_steps": 2})
    trial = Trial(
        measure=MEASURE_GLOBAL, setup=setup, arm=Arm(name="r=3", fields={"method": "lora", "rank": 3}), seed=0
    )
    record = measured(trial, tmp_path, lambda event: None)
    assert record.status == DONE
    for rank in (1, 2):
        equal, threshold = (record.numbers[f"{kind}{rank} parameters"] for kind in (CUT, GLOBAL))
        assert 0 < threshold <= equal
        assert len(record.items[f"{GLOBAL}{rank}"]) == len(record.items[f"{CUT}{rank}"]) == len(record.items["score"])
