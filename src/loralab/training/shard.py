"""A frozen base split over several processes: each keeps a part of every block's weights.

The parts are put together again while a block computes (FSDP2: Zhao et al. 2023, arXiv:2304.11277,
with `fully_shard` of PyTorch). What is trained stays whole in every process, and so do the
embeddings and the head, which are used outside of the blocks.
"""

from typing import Any

from torch import nn

from loralab.adapters.attach import Adapter
from loralab.adapters.bases import is_quantized
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.methods import Method, Prompt
from loralab.errors import ConfigError
from loralab.training.memory import checkpointed_blocks
from loralab.training.world import World


def require_shardable(model: nn.Module, method: Method, world: World) -> None:
    """Refuse what cannot be split.

    Raises:
        ConfigError: there is one process, no block, weights in few bits, or a learnt prompt.
    """
    if world.size == 1:
        raise ConfigError(
            "shard_base splits the base over several processes, and this is a single one; start "
            "them with torchrun or accelerate launch"
        )
    if isinstance(method, Prompt):  # its gradients reach a block a second time, past its output
        raise ConfigError(
            "shard_base: a learnt prompt passes through the blocks a second time; use prefix"
        )
    if not checkpointed_blocks(model):
        raise ConfigError(f"shard_base: {type(model).__name__} has no blocks to split")
    if any(is_quantized(module) for module in model.modules()):
        raise ConfigError("shard_base: weights in few bits cannot be split; leave one of both out")


def shard_base(adapter: Adapter, world: World) -> None:
    """Split the frozen weights of every block, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = adapter.model
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world.size,))
    adapter.base_fingerprint = fingerprint(model, frozenset(adapter.saved))
    own = {p for p in model.parameters() if p.requires_grad} | set(adapter.parameters())
    for block in checkpointed_blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=own)
