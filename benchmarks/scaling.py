"""What a token costs: by length, batch, rank and model size, and what the adapter adds.

Forward and backward of the training path on random ids, loss on the last 40 % of each row, settings
in turn, at least five rounds. `length` keeps the tokens of a step the same (2,048); `rank` and
`model` are at 4 x 256 tokens, `batch` at rows of 128. Each cost is per token, against the first
setting of its group in the same round. `adapter` compares with the floor: the same path through the
frozen base, forward and input gradients only. peft's column is its model under bf16 autocast on
the same rows, padded (--peer).

    python benchmarks/scaling.py [--only length batch rank model adapter] [--rounds 5] [--peer]
        [--json FILE]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from sides import Figures, finish, parser, ratios, shown, spread, table
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab.models.device import device_here, resolve_precision
from loralab.models.load import load, parse_dtype
from loralab.tasks.examples import IGNORED, Example
from loralab.training.fast.forward_path import fastest_path

Step = Callable[[], None]
Settings = dict[str, tuple[int, Callable[[], Step]]]  # name -> (tokens, what makes the step)
SHAPES = {  # hidden, intermediate, layers, heads, key heads: the small ones of the SmolLM2 family
    "30M": (384, 1024, 12, 6, 2),
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
}
LENGTHS = {length: [length] * (2048 // length) for length in (256, 512, 1024, 2048)}


def rows(lengths: list[int]) -> list[Example]:
    """Random ids with loss on the last 40 %."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(1000, (length,), generator=draw).tolist())
        cut = round(0.6 * length)
        found.append(Example(number, ids, (IGNORED,) * cut + ids[cut:]))
    return found


def model(size: str = "135M") -> Any:
    """A Llama of random weights, in the precision that loralab would choose."""
    hidden, inner, layers, heads, key_heads = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).to(parse_dtype(resolve_precision("auto")))
    return made.to(device_here()).requires_grad_(False)


def ours(lengths: list[int], base: Any, rank: int = 8) -> Step:
    """Loss and gradients of an adapter, as the training loop gets them."""
    adapter = loralab.attach(base, loralab.LoRA(rank=rank))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    examples = rows(lengths)

    def step() -> None:
        base.train()
        with path.activated():
            for part in path.micro_batches(examples):
                path.loss(part).backward()
        for parameter in adapter.parameters():
            parameter.grad = None

    return step


def floor(lengths: list[int], base: Any) -> Step:
    """The same path through the base alone: forward and the gradients of inputs."""
    probe = loralab.attach(base, loralab.LoRA(rank=1, target_modules=["layers.0.self_attn.q_proj"]))
    path = fastest_path(probe, "causal-lm", pad_id=0)
    probe.detach()
    base.requires_grad_(False)
    base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    examples = rows(lengths)

    def step() -> None:
        base.train()
        with path.activated():
            for part in path.micro_batches(examples):
                path.loss(part).backward()

    return step


def peer(lengths: list[int]) -> Step:
    """peft's model under bf16 autocast, rows of one length, so that nothing is padded."""
    from peft import LoraConfig, get_peft_model

    base = load("smollm2-135m", kind="causal-lm").model
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).train()
    examples = rows(lengths)
    device = device_here()
    ids = torch.tensor([e.input_ids for e in examples], device=device)
    labels = torch.tensor([e.labels for e in examples], device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            adapted(input_ids=ids, labels=labels).loss.backward()
        adapted.zero_grad()

    return step


def groups(only: list[str], with_peer: bool) -> dict[str, dict[str, tuple[int, Callable[[], Step]]]]:
    """What is compared, by name."""
    found: dict[str, Settings] = {
        "length": {f"{length}": (2048, lambda s=sizes: ours(s, model())) for length, sizes in LENGTHS.items()},
        "batch": {f"{n}": (128 * n, lambda n=n: ours([128] * n, model())) for n in (8, 1, 2, 4, 16, 32)},
        "rank": {f"{r}": (1024, lambda r=r: ours([256] * 4, model(), rank=r)) for r in (8, 1, 4, 16, 64, 256)},
        "model": {size: (1024, lambda size=size: ours([256] * 4, model(size))) for size in SHAPES},
        "adapter": {
            "frozen base": (1024, lambda: floor([256] * 4, model())),
            "LoRA r=8": (1024, lambda: ours([256] * 4, model())),
        },
    }
    if with_peer:
        found["length, peft"] = {f"{length}": (2048, lambda s=sizes: peer(s)) for length, sizes in LENGTHS.items()}
        only = [*only, *(["length, peft"] if "length" in only else [])]
    return {name: found[name] for name in only}


def measured(settings: Settings, rounds: int) -> dict[str, Any]:
    """Seconds per token of every setting, in turn."""
    steps = {name: (tokens, make()) for name, (tokens, make) in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, (tokens, step) in steps.items():
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / tokens)
    first = next(iter(seconds.values()))
    return {
        name: {"tokens_per_second": spread([1 / v for v in values]), "cost": ratios(values, first)}
        for name, values in seconds.items()
    }


def line(group: str, name: str, figures: dict[str, Figures]) -> tuple[str, ...]:
    """One row of the table."""
    return group, name, shown(figures["tokens_per_second"], 0), shown(figures["cost"])


def main() -> None:
    names = ["length", "batch", "rank", "model", "adapter"]
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=names, default=names)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--peer", action="store_true", help="peft at the same lengths, too")
    chosen = options.parse_args()
    found = {group: measured(settings, chosen.rounds) for group, settings in groups(chosen.only, chosen.peer).items()}
    lines = [line(group, name, own) for group, cells in found.items() for name, own in cells.items()]
    head = ("varied", "setting", "tokens/s", "cost of a token, first of its group = 1")
    title = f"A training step, Llama of SmolLM2-135M's shape, {chosen.rounds} rounds"
    finish(table(title, head, lines), {"groups": found}, chosen.json)


if __name__ == "__main__":
    main()
