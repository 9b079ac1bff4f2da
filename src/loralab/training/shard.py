"""A frozen base split over several processes: each keeps a part of every block's weights.

The parts are put together again while a block computes (FSDP2: Zhao et al. 2023, arXiv:2304.11277,
with `fully_shard` of PyTorch). What is trained stays whole in every process, and so do the
embeddings and the head, which are used outside of the blocks.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.fingerprint import fingerprint
from loralab.errors import ConfigError
from loralab.models.device import device_here
from loralab.training.memory import checkpointed_blocks, map_large_tensors
from loralab.training.world import World


def require_shardable(model: nn.Module, world: World) -> None:
    """Refuse what cannot be split.

    Raises:
        ConfigError: there is one process, or no block.
    """
    if world.size == 1:
        raise ConfigError(
            "shard_base splits the base over several processes, and this is a single one; start "
            "them with torchrun or accelerate launch",
            code="single_process",
            field="shard_base",
        )
    if not checkpointed_blocks(model):
        raise ConfigError(
            f"shard_base: {type(model).__name__} has no blocks to split", code="no_blocks", field="shard_base"
        )


def shard_base(model: nn.Module, adapters: Sequence[Adapter], world: World) -> None:
    """Split the frozen weights of every block, in place, and bring all to the device.

    A model in host memory gets there block by block, so that a device never has to hold more than
    its parts and one block.

    Args:
        model: through which all passes with gradients go.
        adapters: all that stand on its weights. Their models may be others around the very same
            weights (`shared_copy`); through those only passes without gradients can go.
    """
    from torch.distributed.device_mesh import init_device_mesh

    device = device_here()
    mesh = init_device_mesh(device.type, (world.size,))
    own = {p for p in model.parameters() if p.requires_grad}
    for adapter in adapters:
        adapter.base_fingerprint = fingerprint(adapter.model, frozenset(adapter.saved))
        own |= {*adapter.parameters(), *filter(_trained, adapter.model.parameters())}
    blocks = checkpointed_blocks(model)
    copies = [checkpointed_blocks(a.model) for a in adapters if a.model is not model]
    for block, *others in zip(blocks, *copies, strict=True):
        block.to(device)
        _split(block, others, mesh, own)
    inside = {module for block in blocks for module in block.modules()}
    for module in set(model.modules()) - inside:
        module._apply(lambda tensor: tensor.to(device), recurse=False)
    map_large_tensors()
    if any(adapter.spec.own_pass for adapter in adapters):
        # gradients reach the last block of the prompt's own pass by its keys and values alone,
        # without a word to FSDP: that block is not split again between the passes
        blocks[-1].set_reshard_after_forward(False)
        blocks[-1].set_reshard_after_backward(False)


def _split(block: Any, others: Sequence[nn.Module], mesh: Any, own: set[nn.Parameter]) -> None:
    """Split one block; `others` are the blocks of other models around the same weights."""
    from torch.distributed.fsdp import fully_shard

    for number, other in enumerate(others):  # weights of all that is inside are kept alike
        block.add_module(f"other_{number}", other)
    # else FSDP takes each block for a whole model, which stays put together after its forward
    fully_shard(block, mesh=mesh, ignored_params=own, reshard_after_forward=True)
    for number, other in enumerate(others):
        del block._modules[f"other_{number}"]
        other.register_forward_pre_hook(lambda *_: block.unshard())
        other.register_forward_hook(lambda *_: block.reshard())


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad
