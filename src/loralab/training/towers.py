"""Adapted towers: they learn from rows with pictures, and only where the language part reads them."""

from dataclasses import replace

import torch

from loralab.adapters.adapter import Adapter
from loralab.errors import ConfigError, join_limited
from loralab.tasks.examples import Encoded
from loralab.training.fast.forward_path import ForwardPath, smallest_with_picture
from loralab.training.learning import in_towers, trained


def require_pictures(adapter: Adapter, encoded: Encoded) -> None:
    """Refuse to adapt towers where no row has a picture.

    Raises:
        ConfigError: it would leave them as they are.
    """
    if not smallest_with_picture(encoded.examples) and in_towers(adapter, list(trained(adapter))):
        raise ConfigError(
            "target_modules means layers of towers, which no training row reaches: none has a picture; leave them "
            "out, or give rows with a column image or images",
            code="towers_without_pictures",
            field="target_modules",
        )


def with_idle_towers(adapter: Adapter, path: ForwardPath, encoded: Encoded) -> Encoded:
    """Return the rows with a note of adapted layers of towers that no gradient reaches, if there are any."""
    if not (tensors := in_towers(adapter, list(trained(adapter)))):
        return encoded
    seen = smallest_with_picture(encoded.examples)
    known = {name: p for name, p in trained(adapter).items() if name in tensors}
    with path.activated(), torch.random.fork_rng():
        found = torch.autograd.grad(path.loss(seen), list(known.values()), allow_unused=True)
    modules = {name: name.rpartition(".lora_")[0] or name for name in known}
    # of a module's tensors one may have no gradient yet: A where B is zero, B where A is
    reached = {modules[name] for name, g in zip(known, found, strict=True) if g is not None and g.any()}
    if not (idle := [name for name in dict.fromkeys(modules.values()) if name not in reached]):
        return encoded
    note = f"no gradient reaches {join_limited(idle)}: the model does not use what it makes of a picture"
    return replace(encoded, notes=(*encoded.notes, note))
