"""What adapters need of a machine, as formulas: numbers, bytes, operations, seconds.

Each formula is one function; its docstring is the line that docs/scale.md shows. GB are 10^9 bytes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

BF16, FP32 = 2, 4  # bytes of a number
LINEAR_BYTES = {"bf16": 2.0, "int8": 1.0, "nf4": 4.127 / 8}  # of a weight in a linear layer
HEADER = 129  # bytes that safetensors' header takes for a tensor of an adapter; found, not derived
STATE = 20  # bytes of a trained number: itself, gradient, its start to compare with, two moments
FULL_STATE = 18  # of a number in a full fine-tune: bf16 copy, fp32 itself, gradient, two moments
ALLOCATED, WORKSPACE = 1.25, 0.12e9  # loralab.training.memory's, found there
LIBRARIES = 0.39e9  # a process that has imported all that training needs; measured by machine.py
WHOLE = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-like model: grouped queries, gated feed-forward, RMS norms."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    width: int  # of a head
    words: int
    tied: bool = False
    biased: bool = False  # q, k and v

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        h, f, q, kv = self.hidden, self.inner, self.heads * self.width, self.groups * self.width
        return {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "gate": (h, f), "up": (h, f), "down": (f, h)}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="SmolLM2-135M", hidden=576, inner=1536, layers=30, heads=9, groups=3, width=64, words=49152, tied=True
        ),
        Shape(
            name="Llama-3.2-1B",
            hidden=2048,
            inner=8192,
            layers=16,
            heads=32,
            groups=8,
            width=64,
            words=128256,
            tied=True,
        ),
        Shape(name="Llama-3.1-8B", hidden=4096, inner=14336, layers=32, heads=32, groups=8, width=128, words=128256),
        Shape(
            name="Qwen2.5-32B",
            hidden=5120,
            inner=27648,
            layers=64,
            heads=40,
            groups=8,
            width=128,
            words=152064,
            biased=True,
        ),
        Shape(name="Llama-3.1-70B", hidden=8192, inner=28672, layers=80, heads=64, groups=8, width=128, words=128256),
    )
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine has.

    `kept` are the bytes that loralab keeps of each number of a resident adapter: fp32, and for the
    compiled step of a processor bf16 beside it. `price` is what an hour costs, in any unit.
    """

    name: str
    memory: float  # bytes, for weights and caches
    bandwidth: float  # bytes a second, of that memory
    flops: float  # bf16 operations a second
    kept: int = FP32
    price: float = 1.0


def linear_parameters(shape: Shape) -> int:
    """Weights in linear layers = layers * sum(in * out); the output head is not among them."""
    return shape.layers * sum(i * o for i, o in shape.linears.values())


def head_parameters(shape: Shape) -> int:
    """Weights of the output head = vocabulary * hidden."""
    return shape.words * shape.hidden


def parameters(shape: Shape) -> int:
    """Numbers of a base = linear + head + embedding if it is another + norms + biases."""
    norms = (2 * shape.layers + 1) * shape.hidden
    biases = shape.layers * sum(shape.linears[n][1] for n in "qkv") if shape.biased else 0
    tables = head_parameters(shape) * (1 if shape.tied else 2)
    return linear_parameters(shape) + tables + norms + biases


def base_bytes(shape: Shape, kind: str = "bf16") -> float:
    """Bytes of a base = linear * (2 in bf16, 1 in int8, 4.127 / 8 in NF4) + the rest * 2."""
    linear = linear_parameters(shape)
    return linear * LINEAR_BYTES[kind] + (parameters(shape) - linear) * BF16


def lora_parameters(shape: Shape, rank: int = 8, targets: tuple[str, ...] = WHOLE) -> int:
    """Numbers of a LoRA = rank * layers * sum(in + out) over the targeted layers of a block."""
    return rank * shape.layers * sum(sum(shape.linears[name]) for name in targets)


def adapter_bytes(shape: Shape, rank: int = 8, number: int = FP32, targets: tuple[str, ...] = WHOLE) -> float:
    """Bytes of an adapter file = 4 * numbers + 129 * tensors; half in bf16."""
    return number * lora_parameters(shape, rank, targets) + HEADER * 2 * len(targets) * shape.layers


def disk_bytes(shape: Shape, adapters: int, rank: int = 8) -> float:
    """Bytes of N adapters on disk = N * adapter file."""
    return adapters * adapter_bytes(shape, rank)


def merged_bytes(shape: Shape, adapters: int) -> float:
    """Bytes of N merged models = N * base."""
    return adapters * base_bytes(shape)


def kv_bytes(shape: Shape) -> int:
    """Bytes of keys and values of a token = 2 * layers * key heads * head width * 2."""
    return 2 * shape.layers * shape.groups * shape.width * BF16


def resident_bytes(shape: Shape, rank: int = 8, number: int = FP32) -> float:
    """Bytes of an adapter in memory = 4 * numbers; on a CPU in bf16 6, where both are kept."""
    return number * lora_parameters(shape, rank)


def room_for_adapters(
    shape: Shape, machine: Machine, kind: str, answers: int = 16, length: int = 2048, rank: int = 8
) -> int:
    """Adapters that stay in memory = (0.9 * memory - base - answers * length * kv) / resident."""
    left = 0.9 * machine.memory - base_bytes(shape, kind) - answers * length * kv_bytes(shape)
    return max(-1, int(left / resident_bytes(shape, rank, machine.kept)))


def decode_bytes(shape: Shape, kind: str, answers: int, distinct: int, length: int, rank: int = 8) -> float:
    """Bytes read for one token of each answer = base without a separate embedding
    + distinct adapters * 2 * LoRA numbers + answers * length * kv."""
    embedding = 0 if shape.tied else BF16 * head_parameters(shape)
    adapters = distinct * BF16 * lora_parameters(shape, rank)
    return base_bytes(shape, kind) - embedding + adapters + answers * length * kv_bytes(shape)


def token_flops(shape: Shape, adapters: bool, rank: int = 8, head: bool = True) -> float:
    """Operations of a token forward = 2 * (linear + head + LoRA)."""
    own = lora_parameters(shape, rank) if adapters else 0
    return 2 * (linear_parameters(shape) + own + (head_parameters(shape) if head else 0))


def decode_ceiling(shape: Shape, machine: Machine, kind: str, answers: int, distinct: int, length: int) -> float:
    """Tokens/s at most = answers / max(bytes / bandwidth, answers * operations / FLOP/s)."""
    read = decode_bytes(shape, kind, answers, distinct, length) / machine.bandwidth
    work = answers * token_flops(shape, distinct > 0) / machine.flops
    return answers / max(read, work)


def answer_ceiling(shape: Shape, machine: Machine, answers: int, distinct: int, prompt: int, new: int) -> float:
    """With prompts = answers * new / (prompts * operations / FLOP/s + (new - 1) * step)."""
    reading = answers * prompt * token_flops(shape, distinct > 0, head=False) / machine.flops
    length = prompt + new // 2
    step = answers / decode_ceiling(shape, machine, "bf16", answers, distinct, length)
    return answers * new / (reading + (new - 1) * step)


def train_flops(shape: Shape, rank: int = 8, length: int = 0, labelled: float = 1.0, full: bool = False) -> float:
    """Operations of a trained token = 4 * (linear + labelled * head) + 6 * LoRA
    + 6 * layers * heads * head width * length (attention); 6 * all in a full fine-tune."""
    attention = 6 * shape.layers * shape.heads * shape.width * length
    if full:
        return 6 * (linear_parameters(shape) + labelled * head_parameters(shape)) + attention
    base = 4 * (linear_parameters(shape) + labelled * head_parameters(shape))
    return base + 6 * lora_parameters(shape, rank) + attention


def train_hours(tokens: float, flops: float, machine: Machine, share: float) -> float:
    """Hours = tokens * operations / (share * FLOP/s) / 3600; cost = hours * price per hour."""
    return tokens * flops / (share * machine.flops) / 3600


def activation_bytes(shape: Shape, rank: int = 8, number: int = BF16) -> float:
    """Bytes kept of a token = layers * (4 hidden + 2 queries + 2 keys + 3 inner + 7 rank) * 2
    + layers * (heads + 2) * 4 + 2 hidden * 2."""
    q, kv = shape.heads * shape.width, shape.groups * shape.width
    wide = 4 * shape.hidden + 2 * q + 2 * kv + 3 * shape.inner + 7 * rank
    kept = shape.layers * (wide * number + (shape.heads + 2) * FP32)
    return kept + 2 * shape.hidden * number


def checkpointed_bytes(shape: Shape, rank: int = 8) -> float:
    """The same with gradient checkpointing = layers * hidden * 2 + that of one block."""
    return shape.layers * shape.hidden * BF16 + activation_bytes(shape, rank) / shape.layers


def train_bytes(shape: Shape, kind: str, tokens: int, rank: int = 8, checkpointed: bool = True) -> float:
    """Bytes of a training = base + 20 * LoRA numbers + 1.25 * tokens at once * kept + 0.51 GB."""
    kept = checkpointed_bytes(shape, rank) if checkpointed else activation_bytes(shape, rank)
    fixed = base_bytes(shape, kind) + STATE * lora_parameters(shape, rank)
    return fixed + ALLOCATED * tokens * kept + WORKSPACE + LIBRARIES


def full_bytes(shape: Shape) -> float:
    """Bytes of a full fine-tune = 18 * numbers, activations not counted."""
    return FULL_STATE * parameters(shape)


def cold_seconds(size: float, fixed: float, per_byte: float) -> float:
    """Seconds that a cold load adds to the first token = fixed + bytes * seconds per byte."""
    return fixed + size * per_byte


def popularity(adapters: int, exponent: float) -> Any:
    """Share of requests of the k-th most asked adapter = k^-s / sum of all (Zipf)."""
    weights = np.arange(1, adapters + 1, dtype=float) ** -exponent
    return weights / weights.sum()


@functools.cache
def hit_rate(adapters: int, places: int, exponent: float) -> float:
    """Requests that find their adapter in memory = sum p (1 - e^(-p T)), least recently used out,
    with T so that sum (1 - e^(-p T)) = places (Che's approximation)."""
    if places >= adapters:
        return 1.0
    p = popularity(adapters, exponent)
    low, high = 0.0, 1.0
    while -np.expm1(-p * high).sum() < places:
        high *= 4
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-p * middle).sum() < places else (low, middle)
    return float((p * -np.expm1(-p * high)).sum())


def needed_hits(cold: float, allowed: float) -> float:
    """Hit rate that keeps the mean wait for loading below a limit = 1 - limit / cold."""
    return max(0.0, 1 - allowed / cold)


def most_requests(cold: float, hits: float) -> float:
    """Requests/s that one loading thread keeps up with = 1 / (cold * (1 - hit rate))."""
    return float("inf") if hits >= 1 else 1 / (cold * (1 - hits))


def all_reduce_bytes(shape: Shape, processes: int, rank: int = 8, full: bool = False) -> float:
    """Data parallel, sent by each process a step = 2 * (n - 1) / n * 4 * trained numbers."""
    trained = parameters(shape) if full else lora_parameters(shape, rank)
    return 2 * (processes - 1) / processes * FP32 * trained


def all_gather_bytes(shape: Shape, processes: int) -> float:
    """FSDP2, received by each process a pass = 2 * (n - 1) / n * 2 * linear (forward, backward)."""
    return 2 * (processes - 1) / processes * BF16 * linear_parameters(shape)


def sharded_bytes(shape: Shape, processes: int) -> float:
    """FSDP2, base in each process = 2 * linear * (1 / n + 1 / layers) + the rest * 2."""
    linear = linear_parameters(shape)
    parts = linear * (1 / processes + 1 / shape.layers)
    return BF16 * (parts + parameters(shape) - linear)


FORMULAS: tuple[Callable[..., Any], ...] = (
    parameters,
    base_bytes,
    lora_parameters,
    adapter_bytes,
    merged_bytes,
    kv_bytes,
    resident_bytes,
    room_for_adapters,
    decode_bytes,
    decode_ceiling,
    answer_ceiling,
    train_flops,
    train_hours,
    activation_bytes,
    checkpointed_bytes,
    train_bytes,
    full_bytes,
    cold_seconds,
    popularity,
    hit_rate,
    needed_hits,
    most_requests,
    all_reduce_bytes,
    all_gather_bytes,
    sharded_bytes,
)


def number_of(formula: Callable[..., Any]) -> str:
    """Under which number docs/scale.md has a formula."""
    return f"F{FORMULAS.index(formula) + 1}"
