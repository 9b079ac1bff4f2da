"""Rows of a program's own batches, each through the adapter that it names."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from loralab.adapters.grouped import Bank, cannot_share, spans_of
from loralab.adapters.several import require_adapters
from loralab.errors import AdapterStateError, ConfigError


@contextlib.contextmanager
def routed(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Send row i of every batch in the block through the adapter names[i]; None is the base.

    The base runs once for all rows. Rows of one adapter that stand together cost least.

    Raises:
        ConfigError: `names` is one text, or empty.
        AdapterStateError: a name is unknown, an adapter is merged or cannot share a batch (prefix
            and prompt tuning), or in the block: the batch has another number of rows.
    """
    adapters = require_adapters(model)
    if isinstance(names, str) or not names:
        raise ConfigError(
            f"routed() needs a name or None for each row of the batch, got {names!r}",
            code="invalid_names",
            field="names",
        )
    chosen = {name: adapters.find(name) for name in names if name is not None}
    for name, adapter in chosen.items():
        if reason := cannot_share({**adapter.modules, **adapter.saved}):
            raise AdapterStateError(
                f"adapter {name!r} cannot share a batch: {reason}; give its rows a batch of their own, in a "
                f'block with loralab.attached(model)["{name}"].active()',
                code="cannot_route",
                field=name,
            )
    acting = adapters.current
    with adapters.standing(None):
        if acting is not None:
            acting.learn(True)
        bank = Bank(adapters.model)
        check = adapters.model.register_forward_pre_hook(_RowCount(len(names)), with_kwargs=True)
        try:
            for adapter in chosen.values():
                adapter.follow()
            bank.put_all(chosen)
            with bank.routed(spans_of(names)):
                yield
        finally:
            check.remove()
            bank.remove()


class _RowCount:
    """A hook before the model that refuses a batch of another number of rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = next((len(x) for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
        if rows is not None and rows != self.count:
            raise AdapterStateError(
                f"routed() was given {self.count} names, and the batch has {rows} rows",
                code="rows_differ",
                field="names",
            )
