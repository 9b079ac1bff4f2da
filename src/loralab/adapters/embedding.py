"""The low-rank update on nn.Embedding, and embedding rows that are trained as they are.

Axes: V rows, D dimensions, R rank. peft's roles: A (R, V) is zero at the start and B (D, R)
random, since looking up a row of A' is what a product with a one-hot vector is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.methods import LoRA
from loralab.adapters.wrapper import Wrapper, to_wide
from loralab.errors import ConfigError


class EmbeddingWithLoRA(Wrapper):
    """A frozen embedding plus a low-rank update of its table: W0 + (alpha / r) (B A)'."""

    def __init__(self, base: nn.Embedding, config: LoRA, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if config.dora or config.init == "pissa":
            raise ConfigError("an embedding takes plain LoRA: no dora, no pissa", code="lora_only", field="method")
        output_scale(base)  # raises where the base is more than a table
        self.rank, self.scaling = config.rank, config.factor
        rows, width = base.weight.shape
        draw = torch.randn(width, config.rank, generator=generator)
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.rank, rows, device=base.weight.device))
        self.lora_embedding_B = nn.Parameter(draw.to(base.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) -> (..., D)."""
        y: Tensor = self.base(ids)
        if self.merged:
            return y
        low = F.embedding(ids, self.lora_embedding_A.T, self.base.padding_idx)  # (..., R)
        scaling = self.scaling * output_scale(self.base)
        return y + (scaling * F.linear(low, self.lora_embedding_B)).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A (R, V), B (D, R) and the factor of the update, which is turned over."""
        return self.lora_embedding_A, self.lora_embedding_B, self.scaling

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the table with the update in it."""
        update = (self.lora_embedding_B @ self.lora_embedding_A).T  # (V, D)
        return {"weight": to_wide(self.base.weight) + self.scaling * update}


class TrainedRows(Wrapper):
    """An embedding, or an output head, some rows of which are trained: new tokens, for example.

    The rows are kept apart, in fp32; all others stay the base's. A head that shares its weight
    with the embedding shares the trained rows too: pass the embedding's wrapper as `shared`.
    """

    def __init__(self, base: nn.Module, rows: tuple[int, ...], shared: "TrainedRows | None" = None) -> None:
        super().__init__(base)
        weight = self.base.weight
        if max(rows) >= len(weight):
            raise ConfigError(
                f"token_rows has {max(rows)}, but the embedding has {len(weight)} rows; resize it "
                "first (model.resize_token_embeddings)",
                code="row_out_of_range",
                field="token_rows",
            )
        device = weight.device
        self.register_buffer("rows", torch.tensor(rows, device=device), persistent=False)
        values = weight.detach()[list(rows)].float()
        self.trainable_tokens_delta: nn.Parameter = nn.Parameter(values)
        if shared is not None:
            self.trainable_tokens_delta = shared.trainable_tokens_delta
        self.is_shared = shared is not None
        if isinstance(base, nn.Embedding):
            output_scale(base)  # raises where the base is more than a table

    def forward(self, x: Tensor) -> Tensor:
        """Map ids (...) -> (..., D) of an embedding, or states (..., D) -> (..., V) of a head."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        if not isinstance(self.base, nn.Embedding):
            scores = F.linear(x, self.trainable_tokens_delta.to(x.dtype))  # (..., rows)
            return y.index_copy(-1, self.rows, scores.to(y.dtype))
        places = self._places(x)[..., None]  # (..., 1)
        own = F.embedding(places[..., 0].clamp_min(0), self.trainable_tokens_delta)
        return torch.where(places < 0, y, (output_scale(self.base) * own).to(y.dtype))

    def own_buffers(self) -> dict[str, Tensor]:
        """Return nothing: there are only the rows themselves."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the rows under peft's name; those of a tied head are the embedding's."""
        if self.is_shared:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the whole table with the trained rows in it."""
        whole = to_wide(self.base.weight)
        rows = self.trainable_tokens_delta.to(whole.dtype)
        return {"weight": whole.index_copy(0, self.rows, rows)}

    def _places(self, ids: Tensor) -> Tensor:
        """Return the trained row that each id is, -1 for the others."""
        place = torch.full((len(self.base.weight),), -1, device=ids.device)
        place[self.rows] = torch.arange(len(self.rows), device=ids.device)
        return place[ids]


def output_scale(base: nn.Embedding) -> float | Tensor:
    """Return the factor that an embedding multiplies its rows by (Gemma: the root of its width).

    Raises:
        ConfigError: it does something else with them.
    """
    scale = getattr(base, "embed_scale", None)
    if scale is None and type(base).forward is not nn.Embedding.forward:
        raise ConfigError(
            f"{type(base).__name__} is more than a table of rows; it is not adapted",
            code="not_adaptable",
            field="target_modules",
        )
    found: float | Tensor = 1.0 if scale is None else scale
    return found
