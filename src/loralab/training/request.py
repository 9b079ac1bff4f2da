"""A training as it was asked for, with all that was left open filled in."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from loralab.adapters.methods import AnyMethod, LoRA
from loralab.adapters.registry import spec_of
from loralab.artefacts.merge_aware import require_method
from loralab.errors import ConfigError
from loralab.models.device import resolve_precision
from loralab.models.given import Given, given
from loralab.tasks.catalog import Task
from loralab.tasks.given import read
from loralab.training.from_adapter import gone_on
from loralab.training.objects import name_of, plain_name, require_usable
from loralab.training.optim import usual_rate
from loralab.training.settings import Training


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of a training, precision resolved.

    `settled` is whether a memory budget has made its choice: in the run that this one goes on with.
    `task` are the rows, where they are not simply those behind `data`; `given` is a live model, of
    which `model` is a name for readers, and `name` is what the adapter in it will be called. `track`
    are the trackers that are told of it, which change nothing of it.
    """

    model: str
    data: str
    method: AnyMethod
    training: Training
    mapping: Mapping[str, str]
    settled: bool = False
    task: Task | None = None
    given: Given | None = None
    name: str = "default"
    track: tuple[str, ...] = ()

    @staticmethod
    def of(
        model: Any,
        data: Any,
        method: AnyMethod | None,
        training: Training | None,
        mapping: Mapping[str, str] | None,
        tokenizer: Any = None,
        name: str = "default",
        track: tuple[str, ...] = (),
    ) -> "Request":
        """Return the request with whatever was left to us filled in: precision and learning rate.

        Args:
            model: a name, or a live model with its `tokenizer`.
            data: a name, or rows in memory, which are read here.

        Raises:
            InputError: options that exclude each other, or contradict the adapter that is gone on
                from; a model or data of a wrong type.
        """
        training = training or Training()
        if training.from_adapter is not None:
            method, training = gone_on(method, training)
        method = method or LoRA()
        model, data = plain_name(model), plain_name(data)
        own = given(model, tokenizer)
        if own is not None:
            require_usable(training)
        training = replace(
            training,
            precision=own.precision(training.precision) if own else resolve_precision(training.precision),
            learning_rate=training.learning_rate or usual_rate(method),
        )
        spec = spec_of(method)
        if not spec.scales_gradients and training.precision == "fp16":
            raise ConfigError(
                f"{spec.name} needs gradients that are not scaled, as fp16 does; use bf16 or fp32",
                code="scaled_gradients",
                field="precision",
            )
        if spec.trains_base and training.quantize != "none":
            raise ConfigError(
                "weights in few bits cannot be trained; leave --quantize out", code="trains_quantized", field="quantize"
            )
        if training.merge_aware is not None:
            require_method(method)
        if training.new_tokens and not spec.has("token_rows"):
            raise ConfigError("new_tokens are trained by LoRA only", code="lora_only", field="new_tokens")
        task = None if isinstance(data, str) else read(data, mapping, seed=training.seed)
        return Request(
            model=own.name if own else model,
            data=data if task is None else name_of(data, task),
            method=method,
            training=training,
            mapping=mapping or {},
            task=task,
            given=own,
            name=name,
            track=track,
        )

    def fields(self) -> dict[str, Any]:
        """Return all fields flat, as config.toml holds it; what is unset is left out."""
        name = spec_of(self.method).name
        own = {"model": self.model, "data": self.data, "method": name, "map": dict(self.mapping)}
        flat = {**own, **asdict(self.method), **asdict(self.training)}
        return {key: value for key, value in flat.items() if value not in (None, (), {})}
