"""Speed and memory of LoRA on experts kept in one parameter: loralab against peft's target_parameters.

Both train r=8 on the experts alone of a Qwen3-MoE with random weights, on the same random token
ids, with the same plain loop (AdamW, fp32), in turn. A third side runs the same step on the base
alone, with a gradient at its embeddings: what a side's peak has above that one's is the memory of
its update. Sizes: "tiny" of 2 million parameters, "100m" of 100 million.

    python benchmarks/experts.py [--sizes tiny 100m] [--implementations grouped_mm eager]
        [--pairs 6] [--json FILE]
"""

from typing import Any

import torch
from sides import Turn, Worker, answering, in_turn, parser, ratios, report, shown, spread

ROWS, LENGTH, WARM_UP, RANK = 4, 128, 3, 8
SIDES = ("base", "loralab", "peft")
SIZES = {"tiny": (128, 64, 2, 512), "100m": (512, 256, 7, 8192)}  # hidden, of an expert, layers, vocabulary


def model_of(size: str, implementation: str) -> Any:
    """Return the model with random weights, the same on every side."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    hidden, expert, layers, vocabulary = SIZES[size]
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=expert,
        num_hidden_layers=layers,
        num_experts=32,
        vocab_size=vocabulary,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model


def prepared(side: str, model: Any) -> tuple[Any, list[Any]]:
    """Return the model of a side, and what it trains."""
    if side == "loralab":
        from loralab import LoRA, attach

        adapter = attach(model, LoRA(rank=RANK, target_modules="experts"))
        return model, adapter.parameters()
    if side == "peft":
        from peft import LoraConfig, get_peft_model

        names = ["experts.gate_up_proj", "experts.down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=names))
        return model, [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    return model, [model.get_input_embeddings().weight.requires_grad_(True)]


def work(side: str, size: str, implementation: str, turn: Turn) -> None:
    """Step until nobody asks for more."""
    model, trained = prepared(side, model_of(size, implementation))
    model.train()
    ids = torch.randint(0, SIZES[size][-1], (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if side != "base" else None
    tokens = 0
    while True:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
        tokens += ids.numel()
        turn({"tokens": tokens})


def measure(size: str, implementation: str, pairs: int) -> dict[str, Any]:
    """Measure all sides, step by step in turn."""

    def worker(side: str) -> Worker:
        return Worker(__file__, ["--worker", side, size, implementation])

    counted = in_turn({side: lambda side=side: worker(side) for side in SIDES}, pairs, WARM_UP)
    speed = {side: [r["tokens"] / r["seconds"] for r in rows] for side, rows in counted.items()}
    peak = {side: max(r["peak"] for r in rows) for side, rows in counted.items()}
    update = {side: peak[side] - peak["base"] for side in SIDES if side != "base"}
    return {
        "size": size,
        "implementation": implementation,
        "pairs": pairs,
        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
        "speed_ratio": ratios(speed["loralab"], speed["peft"]),
        "peak_bytes": peak,
        "update_bytes": update,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    implementations = ("grouped_mm", "eager", "batched_mm")
    options.add_argument("--implementations", nargs="+", choices=implementations, default=implementations[:2])
    options.add_argument("--pairs", type=int, default=6, help="counted steps of each side")
    options.add_argument("--worker", nargs=3, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        work(*chosen.worker, answering())
        return
    found = [measure(size, way, chosen.pairs) for size in chosen.sizes for way in chosen.implementations]
    rows = [
        {
            "model": r["size"],
            "experts": r["implementation"],
            "base alone, tokens/s": shown(r["tokens_per_second"]["base"], 0),
            "loralab, tokens/s": shown(r["tokens_per_second"]["loralab"], 0),
            "peft, tokens/s": shown(r["tokens_per_second"]["peft"], 0),
            "ratio of pairs": shown(r["speed_ratio"]),
            "update, MB": " : ".join(f"{r['update_bytes'][side] / 1e6:,.0f}" for side in ("loralab", "peft")),
        }
        for r in found
    ]
    title = f"LoRA r={RANK} on experts, {ROWS} x {LENGTH} tokens a step, {chosen.pairs} pairs"
    report(title, rows, found, chosen.json)


if __name__ == "__main__":
    main()
