"""Every method that peft has too: same weights, same logits, same gradients, files both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import IDS, SHALLOW, fill, logits
from torch import nn

from loralab.adapters.attach import attach
from loralab.adapters.folder import CONFIG, read
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, LoRA, Prefix, Prompt

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
LINEAR = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
}
INNER = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}


def configs(name: str) -> dict[str, Any]:
    """Return peft's configurations for one model."""
    linear, task = LINEAR[name], TYPES[name]
    lora: dict[str, Any] = {"task_type": task, "r": 4, "lora_alpha": 12}
    conv1d = {"fan_in_fan_out": name == "gpt2"}
    found: dict[str, Any] = {
        "lora": peft.LoraConfig(**lora, target_modules=linear, **conv1d),
        "rslora": peft.LoraConfig(**lora, target_modules=linear, use_rslora=True, **conv1d),
        "dora": peft.LoraConfig(**lora, target_modules=linear, use_dora=True, **conv1d),
        "embedding": peft.LoraConfig(**lora, target_modules=[EMBEDDING[name], *linear], **conv1d),
        "rows": peft.LoraConfig(**lora, target_modules=linear, trainable_token_indices=[7, 3, 40], **conv1d),
        "adalora": peft.AdaLoraConfig(
            task_type=task, init_r=4, target_r=2, lora_alpha=12, total_step=10, target_modules=linear, **conv1d
        ),
        "ia3": peft.IA3Config(task_type=task, target_modules=linear, feedforward_modules=INNER[name], **conv1d),
        "ia3-outputs": peft.IA3Config(task_type=task, target_modules=linear, feedforward_modules=[], **conv1d),
        "prefix": peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
        "prefix-mlp": peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12
        ),
    }
    found["prompt"] = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5)
    return found


PAIRS = [pytest.param(n, k, id=f"{k}-{n}") for n in SHALLOW for k in configs(n)]


def theirs(name: str, kind: str) -> Any:
    """Return peft's model, with weights that matter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(SHALLOW[name](), configs(name)[kind])
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=draw)
    return model.eval()


def shown(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return logits of the input's own positions: peft's prompt tuning puts others in front."""
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found[:, -ids.shape[1] :] if found.ndim == 3 else found


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_peft_wrote_gives_the_same_logits_here(name: str, kind: str, tmp_path: Path) -> None:
    peft_model = theirs(name, kind)
    with torch.no_grad():
        want = shown(peft_model)
    peft_model.save_pretrained(tmp_path)
    ours = SHALLOW[name]()
    load(ours, tmp_path)
    assert not torch.allclose(want, logits(SHALLOW[name]()), atol=1e-3)
    torch.testing.assert_close(logits(ours), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_was_written_here_gives_the_same_logits_there(name: str, kind: str, tmp_path: Path) -> None:
    ours = SHALLOW[name]()
    before = logits(ours)
    peft_model = theirs(name, kind)
    peft_model.save_pretrained(tmp_path / "theirs")
    load(ours, tmp_path / "theirs").save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(SHALLOW[name](), tmp_path / "ours").eval()
    with torch.no_grad():
        found = shown(again)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, logits(ours), rtol=1e-5, atol=2e-6)


OWN: dict[str, Any] = {
    "lora": LoRA(rank=4, alpha=12),
    "rslora": LoRA(rank=4, alpha=12, scaling="alpha/sqrt(r)"),
    "unscaled": LoRA(rank=4, alpha=12, scaling="none"),
    "dora": LoRA(rank=4, alpha=12, dora=True),
    "pissa": LoRA(rank=4, init="pissa"),
    "rows": LoRA(rank=4, token_rows=(7, 3, 40)),
    "adalora": AdaLoRA(rank=4, target_rank=2, total_steps=8, initial_steps=1, final_steps=2),
    "ia3": IA3(),
    "prefix": Prefix(tokens=5),
    "prefix-mlp": Prefix(tokens=5, mlp=True, mlp_width=12),
    "prompt": Prompt(tokens=5),
}


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize("kind", OWN)
def test_what_was_trained_here_works_there(name: str, kind: str, tmp_path: Path) -> None:
    ours = SHALLOW[name]()
    heads = ("classifier",) if name == "bert" else ()
    adapter = attach(ours, replace(OWN[kind], modules_to_save=heads))
    if kind == "adalora":
        _train_adalora(adapter)
    else:
        fill(adapter)
    adapter.save(tmp_path)
    found = peft.PeftModel.from_pretrained(SHALLOW[name](), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(shown(found), logits(ours), rtol=1e-4, atol=1e-5)


def _train_adalora(adapter: Any) -> None:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=5.0)
    adapter.model.train()
    for step in range(8):
        torch.manual_seed(step)
        (adapter.model(IDS).logits - 1).square().mean().backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    adapter.model.eval()


def ours_to_theirs(key: str) -> str:
    """Return the end of a trained tensor's name in peft's model, from its name here."""
    for end in ("lora_A", "lora_B"):
        if key.endswith(f".{end}"):
            return f"{key}.default.weight"
    key = key.replace(".magnitude", ".lora_magnitude_vector.default.weight")
    return key.replace(".trainable_tokens_delta", ".token_adapter.trainable_tokens_delta.default")


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "rows"])
def test_gradients_are_those_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    peft_model = theirs(name, kind)
    peft_model.save_pretrained(tmp_path)
    ours = SHALLOW[name]()
    adapter = load(ours, tmp_path)
    (shown(peft_model) - 1).square().mean().backward()
    (shown(ours) - 1).square().mean().backward()
    want = {n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None}
    compared = 0
    for key, parameter in adapter.named_parameters().items():
        if key in adapter.saved or key.startswith(tuple(adapter.saved)):
            continue
        gradient = next(g for n, g in want.items() if n.endswith(ours_to_theirs(key)))
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=key)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", SHALLOW)
def test_prefix_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    peft_model = theirs(name, "prefix")
    peft_model.save_pretrained(tmp_path)
    ours = SHALLOW[name]()
    adapter = load(ours, tmp_path)
    (shown(peft_model) - 1).square().mean().backward()
    (shown(ours) - 1).square().mean().backward()
    want = peft_model.prompt_encoder["default"].embedding.weight.grad
    own = next(p for n, p in adapter.named_parameters().items() if n.endswith("table.weight"))
    torch.testing.assert_close(own.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHALLOW)
def test_ia3_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    peft_model = theirs(name, "ia3")
    peft_model.save_pretrained(tmp_path)
    ours = SHALLOW[name]()
    adapter = load(ours, tmp_path)
    (shown(peft_model) - 1).square().mean().backward()
    (shown(ours) - 1).square().mean().backward()
    want = {n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None}
    for key, parameter in adapter.named_parameters().items():
        if "ia3_l" in key:
            gradient = next(g for n, g in want.items() if n.endswith(f"{key}.default"))
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_adalora_files_that_lost_a_whole_module(tmp_path: Path) -> None:
    """Expect peft to keep masks of the ranks that are left, none of them for a module that lost all."""
    peft_model = theirs("llama", "adalora")
    config = peft_model.peft_config["default"]
    config.rank_pattern = {}
    for number, (key, _) in enumerate((n, p) for n, p in peft_model.named_parameters() if n.endswith("lora_E.default")):
        mask = [False] * 4 if number == 0 else [True, False, number % 2 == 0, False]
        config.rank_pattern[key.removeprefix("base_model.model.").removesuffix(".default")] = mask
    peft_model.save_pretrained(tmp_path)
    ours = SHALLOW["llama"]()
    adapter = load(ours, tmp_path)
    assert len(adapter.modules) == 5
    assert {module.rank for module in adapter.modules.values()} == {1, 2}
    for name, module in peft_model.named_modules():
        if name.endswith("q_proj") and ".0." in name:
            with torch.no_grad():
                module.lora_E["default"].zero_()
    with torch.no_grad():
        masked = SHALLOW["llama"]()
        load(masked, tmp_path)
        assert torch.equal(logits(masked), logits(ours))


def test_a_method_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    attach(model := SHALLOW["llama"](), LoRA()).save(tmp_path)
    assert model is not None
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / "loralab.json").unlink()
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "peft_type": "VERA"}))
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert (error.value.code, error.value.field) == ("unknown_method", "peft_type")
