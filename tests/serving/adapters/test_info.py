"""The entry of an adapter: its method as --method has it, and the score that decides."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loralab.adapters.registry import built_in, method_named, names
from loralab.serving.adapters.info import describe, method_of
from loralab.training.settings import Training

PEFT: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LORA"}, "lora"),
    ({"peft_type": "LORA", "use_dora": False, "init_lora_weights": True}, "lora"),
    ({"peft_type": "LORA", "use_dora": True}, "dora"),
    ({"peft_type": "LORA", "use_rslora": True}, "rslora"),
    ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"peft_type": "LORA", "init_lora_weights": "gaussian"}, "lora"),
    ({"peft_type": "ADALORA"}, "adalora"),
    ({"peft_type": "PREFIX_TUNING", "prefix_projection": False}, "prefix"),
    ({"peft_type": "BOTTLENECK", "placement": "pfeiffer"}, "pfeiffer"),
]


def recorded(method: str) -> dict[str, Any]:
    """Return the files that train writes for a method."""
    spec, options = method_named(method)
    quantize = options.get("quantize", "none")
    own = {key: value for key, value in options.items() if key != "quantize"}
    return {
        "method": {"name": spec.name, **asdict(spec.config(**own))},
        "training": asdict(Training(quantize=quantize)),
    }


@pytest.mark.parametrize("method", names())
def test_the_method_is_the_one_that_was_typed(method: str) -> None:
    kind = "ADALORA" if method == "adalora" else "LORA"  # what is written of the others is no matter
    wanted = "houlsby" if method == "bottleneck" else method  # its default, as the paper calls it
    assert method_of({"peft_type": kind}, recorded(method)) == wanted


def test_another_factor_than_that_of_the_paper_is_the_same_method() -> None:
    record = recorded("lora+")
    record["method"]["lora_plus"] = 4.0
    assert method_of({"peft_type": "LORA"}, record) == "lora+"


@pytest.mark.parametrize(("fields", "method"), PEFT)
def test_without_a_record_the_configuration_tells(fields: dict[str, Any], method: str) -> None:
    for record in ({}, {"method": 5}, {"method": {"name": "LORA"}}, {"method": {"name": []}}):
        assert method_of(fields, record) == method


@pytest.mark.parametrize("kind", [spec.peft_type for spec in built_in().values()])
def test_every_kind_of_folder_has_a_method_that_can_be_typed(kind: str) -> None:
    assert method_of({"peft_type": kind}, {}) in names()


@pytest.mark.parametrize(
    ("kind", "metrics", "score"),
    [
        (None, {"loss": 0.5, "perplexity": 1.6}, ("loss", 0.5)),
        (None, {"loss": 0.5, "accuracy": 0.9, "macro_f1": 0.8}, ("accuracy", 0.9)),
        ("token-classification", {"loss": 0.5, "accuracy": 0.9, "entity_f1": 0.7}, ("entity_f1", 0.7)),
        ("multi-label", {"loss": 0.5, "accuracy": 0.9, "micro_f1": 0.7}, ("micro_f1", 0.7)),
        ("reranker", {"loss": 0.5, "ndcg": 0.7}, ("ndcg", 0.7)),
        ("scored-pairs", {"loss": 0.5, "spearman": 0.7}, ("spearman", 0.7)),
        ("another", {"spam_f1": 0.3}, ("spam_f1", 0.3)),  # of another tool
        (None, {"accuracy": "high"}, None),
        (None, {}, None),
    ],
)
def test_the_score_is_the_metric_that_decides(
    kind: str | None, metrics: dict[str, Any], score: tuple[str, float] | None
) -> None:
    record = {"digest": "0" * 64, "base": {"kind": kind}, "metrics": {"validation": metrics}}
    entry = describe("a", Path("a"), {"peft_type": "LORA"}, record, 1)
    assert entry.score == score
