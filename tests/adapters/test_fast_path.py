"""nn.TransformerEncoder gives the same in training and in evaluation, whatever is adapted."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loralab.adapters.attach import attach
from loralab.adapters.grouped import Bank, spans_of
from loralab.adapters.methods import IA3, AdaLoRA, BitFit, FullFineTune, LoRA

LAYERS = ("linear1", "linear2")
METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2),
    "lora, second layer": LoRA(rank=2, target_modules=("linear2",), layers=(1,)),
    "attention": LoRA(rank=2, target_modules=("self_attn",)),
    "dora": LoRA(rank=2, dora=True, target_modules=LAYERS),
    "adalora": AdaLoRA(rank=4, target_rank=2, target_modules=LAYERS),
    "ia3": IA3(target_modules=LAYERS, feedforward_modules=("linear2",)),
    "bitfit": BitFit(),
    "full": FullFineTune(),
    **{
        f"{name} in full": LoRA(rank=2, target_modules=("1.linear2",), modules_to_save=(name,))
        for name in ("linear1", "self_attn", "out_proj", "norm1", "layers.0")
    },
}
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.arange(5) >= torch.tensor([[3], [5], [2]])  # True is padding
every_method = pytest.mark.parametrize("method", METHODS)


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))


def adapted(method: str, model: nn.Module) -> Any:
    adapter = attach(model, METHODS[method])
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapter


def close(found: Tensor, expected: Tensor, seen: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found[seen], expected[seen], rtol=tolerance, atol=tolerance)


@every_method
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_evaluation_is_training_without_dropout(method: str, norm_first: bool, padded: bool) -> None:
    model = encoder(norm_first=norm_first)
    base = copy.deepcopy(model)
    mask = HIDDEN if padded else None
    adapter = adapted(method, model)
    expected = model.train()(X, src_key_padding_mask=mask).detach()
    assert not torch.allclose(expected, base.train()(X, src_key_padding_mask=mask), atol=0.01)
    model.eval()
    close(model(X, src_key_padding_mask=mask).detach(), expected, ~HIDDEN)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(model(X, src_key_padding_mask=mask).clone(), expected, ~HIDDEN)
    adapter.merge()
    with torch.no_grad():
        close(model(X, src_key_padding_mask=mask), expected, ~HIDDEN)
    adapter.unmerge()


@every_method
def test_a_model_in_half_precision_too(method: str) -> None:
    adapter = adapted(method, encoder().bfloat16())
    x = X.bfloat16()
    expected = adapter.model.train()(x).detach()
    with torch.no_grad():
        close(adapter.model.eval()(x), expected, torch.ones(3, 5, dtype=torch.bool), 0.06)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "linear1 in full"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_their_rows(method: str) -> None:
    model = adapted(method, encoder()).model.eval()
    rows = [row[~hidden] for row, hidden in zip(X, HIDDEN, strict=True)]
    with torch.no_grad():
        nested = model(torch.nested.nested_tensor(rows))
        for row, found in zip(rows, nested.unbind(), strict=True):
            torch.testing.assert_close(found, model(row[None])[0], rtol=1e-5, atol=1e-5)


def flags(model: nn.Module) -> list[Any]:
    names = ("activation_relu_or_gelu", "use_nested_tensor")
    return [m.__dict__[n] for m in model.modules() for n in names if n in m.__dict__]


@every_method
def test_without_the_adapter_the_kernel_is_used_as_before(method: str) -> None:
    model = encoder().eval()
    before = flags(model)
    with torch.no_grad():
        expected = model(X)
        adapted(method, model).detach()
        assert torch.equal(model(X), expected)
    assert flags(model) == before == [True, 1, 1]
    adapted(method, model).merge_and_detach()
    assert flags(model) == before


def test_layers_without_an_adapter_keep_the_kernel() -> None:
    model = encoder()
    adapted("lora, second layer", model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]


def test_rows_of_a_batch_go_through_their_own_adapters() -> None:
    model, keys = encoder().eval(), ["a", "b", None]
    bank = Bank(model)
    expected = []
    for number, key in enumerate(keys):
        own = encoder().eval()
        if key is not None:
            adapter = adapted("lora" if key == "a" else "ia3", own)
            bank.put(key, adapter)
        with torch.no_grad():
            expected.append(own(X[number : number + 1]))
    with torch.no_grad(), bank.routed(spans_of(keys)):
        torch.testing.assert_close(model(X), torch.cat(expected), rtol=1e-5, atol=1e-5)
    bank.remove()
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)
