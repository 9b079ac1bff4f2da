"""Settings of the server and limits of a request: frozen configurations.

Standard library only: the command line builds its flags and its help from these classes.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from loralab.errors import ConfigError
from loralab.values import check_choice, check_count, parse_bytes

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTIZERS = ("none", "nf4", "gguf")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Capacity and precision of the engine."""

    resident: Annotated[int, "maximum adapters in memory; least recently used ones are evicted"] = 64
    cache_memory: Annotated[str, "memory of the KV cache, prefix cache included"] = "1GB"
    max_batch: Annotated[int, "maximum concurrent requests in a batch"] = 64
    queue: Annotated[int, "maximum waiting requests; more are refused"] = 256
    step_tokens: Annotated[int, "maximum tokens in one forward pass"] = 512
    max_length: Annotated[int | None, "maximum prompt plus answer in tokens (default: the model's limit)"] = None
    precision: Annotated[str, "dtype of the base: fp32, bf16, fp16; auto is bf16 where the machine computes in it"] = (
        "auto"
    )
    quantize: Annotated[str, "quantise the base's linear layers: none, nf4, or gguf (as in the file)"] = "none"

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("resident", "max_batch", "step_tokens"):
            check_count(name, getattr(self, name))
        check_count("queue", self.queue, 0)
        if self.max_length is not None:
            check_count("max_length", self.max_length, 2)
        parse_bytes("cache_memory", self.cache_memory)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("quantize", self.quantize, QUANTIZERS)

    @property
    def cache_bytes(self) -> int:
        """Return `cache_memory` in bytes."""
        return parse_bytes("cache_memory", self.cache_memory)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request and of one connection.

    Fields with a text are options of the command line. `timeout` includes the time in the queue;
    `inputs` are the prompts, or texts to classify, of one request, `texts` those to embed, or pairs
    to score; `body_seconds` are for the body of a request to arrive, `head_seconds` for its head,
    `stall_seconds` those without reading after which a client is given up; `bodies_bytes` may be on
    their way in all requests together.
    """

    timeout: Annotated[float, "maximum seconds of a request"] = 300.0
    keep_alive: Annotated[float, "keep-alive timeout in seconds"] = 75.0
    connections: Annotated[int, "maximum connections; the longest idle one is closed"] = 512
    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    inputs: int = 128
    texts: int = 2048
    head_seconds: float = 10.0
    stall_seconds: float = 30.0
    bodies_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("timeout", "keep_alive", "body_seconds", "head_seconds", "stall_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"{name} must be a number of seconds above 0, got {value}", code="invalid_seconds", field=name
                )
        for name in ("body_bytes", "inputs", "texts", "connections", "bodies_bytes"):
            check_count(name, getattr(self, name))
