"""Write bottleneck.safetensors: weights, logits and gradients as the adapters library gives them.

It needs `pip install adapters==1.3.0` (transformers 4.57) and so an environment of its own.
"""

import sys

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

WIDTH, SIZE = 4, 16
CONFIGS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=SIZE / WIDTH),
    "pfeiffer": SeqBnConfig(reduction_factor=SIZE / WIDTH),
    "parallel": ParBnConfig(reduction_factor=SIZE / WIDTH),
}
LAYERS = {"adapter_down.0": "down", "adapter_up": "up"}


def our_name(name: str, placement: str) -> str:
    """Return ours for their path of a tensor: Pfeiffer's stands at the module with the norm."""
    place = "network" if placement == "pfeiffer" else "dense.network"
    name = name.replace(f"adapters.{placement}", place)
    for theirs, ours in LAYERS.items():
        name = name.replace(theirs, ours)
    return name


def main(path: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=SIZE,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        num_labels=3,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stored = {f"base.{name}": value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(40, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    stored |= {"ids": ids, "mask": mask}
    adapters.init(model)
    for placement, settings in CONFIGS.items():
        model.add_adapter(placement, config=settings)
        model.train_adapter(placement)
        model.eval()
        own = {n: p for n, p in model.named_parameters() if f".{placement}." in n}
        for parameter in own.values():
            torch.nn.init.normal_(parameter, std=0.3)
        logits = model(ids, attention_mask=mask).logits
        logits.square().sum().backward()
        stored[f"{placement}.logits"] = logits.detach()
        for name, parameter in own.items():
            assert parameter.grad is not None, name
            stored[f"{placement}.weight.{our_name(name, placement)}"] = parameter.detach()
            stored[f"{placement}.grad.{our_name(name, placement)}"] = parameter.grad
        model.zero_grad()
    save_file({name: value.contiguous() for name, value in stored.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
