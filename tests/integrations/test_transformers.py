"""An adapter in transformers' own Trainer."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.loops import CHECKPOINTING, METHODS, ROWS, TEXTS, adapted, arguments, train
from peft import PeftModel
from safetensors.torch import load_file
from tiny import IDS, bert, llama, logits
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM, Trainer, TrainerCallback

import loralab
from loralab import atomic
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import CONFIG, RECORD, TENSORS
from loralab.adapters.methods import AdaLoRA, LoRA
from loralab.artefacts.certificate import REFERENCE
from loralab.errors import AdapterStateError, ConfigError, LearningError, LoralabError
from loralab.integrations.transformers import LoraCallback

ADAPTER = {CONFIG, TENSORS, RECORD}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
    torch._dynamo.reset()


def same(one: Adapter, other: Adapter) -> bool:
    pairs = zip(one.state().values(), other.state().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def close(one: Adapter, other: Adapter) -> None:
    mine, theirs = one.named_parameters(), other.named_parameters()
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["plain", "dora", "adalora", "ia3", "prefix", "head"])
def test_training_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    found = train(
        tmp_path,
        method,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    plain = adapted(method)
    if plain.budget is not None:
        plain.budget.plan(6)
    plain.model.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(6):
        plain.model(input_ids=TEXTS, labels=TEXTS).loss.backward()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    close(found.adapter, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    once = train(tmp_path / "a", METHODS["plain"])
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    close(train(tmp_path / "b", METHODS["plain"], **options).adapter, once.adapter)


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant", "save_strategy": "no"}
    whole = train(tmp_path / "a", METHODS["plain"], per_device_train_batch_size=8, **options)
    parts = train(tmp_path / "b", METHODS["plain"], gradient_accumulation_steps=4, **options)
    close(whole.adapter, parts.adapter)


@pytest.mark.parametrize(
    ("name", "at"), [("lora", 2), ("adalora", 2), ("adalora", 4), ("prefix", 4), ("head", 2), ("probe", 4)]
)
def test_a_resumed_run_ends_in_the_same_bytes(name: str, at: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", METHODS[name])
    again = train(tmp_path / "again", METHODS[name], resume=tmp_path / f"whole/checkpoint-{at}")
    assert same(whole.adapter, again.adapter)
    for file in ADAPTER:
        assert (whole.folder / file).read_bytes() == (again.folder / file).read_bytes(), file
    if whole.adapter.budget and again.adapter.budget:
        assert whole.adapter.budget.ranks == again.adapter.budget.ranks
        assert int(again.adapter.budget.done) == 6
        assert sum(again.adapter.budget.ranks.values()) == 2 * len(again.adapter.modules)


def test_a_callback_that_is_added_later_resumes_too(tmp_path: Path) -> None:
    whole = train(tmp_path, METHODS["adalora"])
    adapter = adapted(METHODS["adalora"])
    trainer = Trainer(model=adapter.model, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.add_callback(LoraCallback(adapter, certify=False))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole.adapter, adapter)


class Prefer(TrainerCallback):
    """Says that the fourth step is the best, and keeps what was trained by then."""

    def __init__(self) -> None:
        self.expected: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, **_: Any) -> None:
        metrics["eval_loss"] = abs(state.global_step - 4.0)
        if state.global_step == 4:
            self.expected = {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["plain", "adalora", "head"])
def test_the_best_weights_are_those_at_the_end(name: str, tmp_path: Path) -> None:
    best = Prefer()
    found = train(
        tmp_path,
        METHODS[name],
        callbacks=(best,),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    assert found.trainer.state.best_global_step == 4
    state = found.model.state_dict()
    assert all(torch.equal(tensor, best.expected[key]) for key, tensor in state.items())
    assert found.adapter.budget is None or int(found.adapter.budget.done) == 4
    again = llama(2)
    loralab.load(again, tmp_path)
    assert torch.equal(logits(again), logits(found.model.eval()))


def test_a_checkpoint_holds_the_adapter_alone_and_peft_reads_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(2).save_pretrained(base)
    found = train(tmp_path / "run", METHODS["plain"])
    folder = tmp_path / "run/checkpoint-6"
    assert {file.name for file in folder.iterdir()} >= ADAPTER
    assert not (folder / "config.json").exists()
    keys = load_file(folder / "model.safetensors").keys()
    assert {key for key in keys if "lora_" not in key} == {"loralab.json"}
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(logits(peft), logits(found.model.eval()))
    again = llama(2)
    loralab.load(again, folder)
    assert torch.equal(logits(again), logits(found.model))


@pytest.mark.parametrize("loader", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("named", [False, True])
def test_no_checkpoint_passes_for_the_plain_model(named: bool, loader: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(2).save_pretrained(base)
    adapter = adapted(METHODS["plain"])
    adapter.model.config._name_or_path = str(base) if named else ""
    trainer = Trainer(
        model=adapter.model,
        args=arguments(tmp_path / "run"),
        train_dataset=ROWS,
        callbacks=[LoraCallback(adapter, certify=False)],
    )
    trainer.train()
    folder = tmp_path / "run/checkpoint-6"
    if named:  # the base that the folder names, and the adapter in it by peft
        read = loader.from_pretrained(folder, local_files_only=True).eval()
        torch.testing.assert_close(logits(read), logits(adapter.model.eval()))
    else:
        with pytest.raises(Exception):  # noqa: B017  (transformers' own, of several kinds)
            loader.from_pretrained(folder, local_files_only=True)


def test_a_merged_model_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    found = train(tmp_path / "run", METHODS["plain"])
    expected = logits(found.model.eval())
    found.adapter.merge()
    found.trainer.save_model(str(tmp_path / "merged"))
    keys = load_file(tmp_path / "merged/model.safetensors").keys()
    assert keys == {key for key in llama(2).state_dict() if key != "lm_head.weight"}
    read = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(read), expected)
    found.adapter.unmerge()
    found.trainer.save_model(str(tmp_path / "adapter"))
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= ADAPTER
    assert not (tmp_path / "adapter/model.safetensors").exists()


def test_a_checkpoint_can_be_overwritten_and_its_old_state_goes(tmp_path: Path) -> None:
    first = train(tmp_path, METHODS["plain"])
    second = train(tmp_path, METHODS["lora"])
    assert not same(first.adapter, second.adapter)
    second.trainer.save_model(str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()


def test_the_certificate_is_that_of_what_was_saved(tmp_path: Path) -> None:
    found = train(tmp_path, METHODS["plain"], certify=True)
    certificate = found.callback.certificate
    assert certificate is not None and certificate.passed
    assert certificate.max_logit_difference == 0 and certificate.prompts == len(ROWS)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["certificate"]["passed"] and (tmp_path / REFERENCE).exists()
    assert record["sample"] == [row["input_ids"] for row in ROWS]
    assert record["base"]["live"] is True
    found.trainer.save_model()  # where it was saved already
    assert json.loads((tmp_path / RECORD).read_text()) == record
    loralab.load(llama(2), tmp_path)
    other = copy.deepcopy(found.model)
    assert torch.equal(logits(other.eval()), logits(found.model.eval()))


def test_a_merge_of_what_was_trained_is_verified(tmp_path: Path) -> None:
    found = train(tmp_path / "run", METHODS["plain"], certify=False)
    adapter = found.adapter
    adapter.merge()
    found.model.save_pretrained(tmp_path / "merged")
    adapter.unmerge()
    llama(2).save_pretrained(tmp_path / "stale")
    for name, passed in (("merged", True), ("stale", False)):
        report = found.callback.verify(tmp_path / name, logits=False)
        assert (report.passed, report.decided) == (passed, True)
    with pytest.raises(AdapterStateError) as caught:
        LoraCallback(adapter).verify(tmp_path / "merged")
    assert caught.value.code == "not_trained"


def test_a_folder_with_a_whole_model_is_refused_before_training(tmp_path: Path) -> None:
    llama(2).save_pretrained(tmp_path / "refused")
    assert refused(tmp_path).code == "folder_taken"


def test_the_certificate_is_on_the_base_that_the_model_came_from(tmp_path: Path) -> None:
    """A language model from a folder without a tokenizer; a classifier whose head is new."""
    llama(2).save_pretrained(tmp_path / "llama")
    bert().bert.save_pretrained(tmp_path / "bert")
    labelled = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(ROWS)]
    models = {
        "llama": (LlamaForCausalLM.from_pretrained(tmp_path / "llama"), ROWS, []),
        "bert": (
            BertForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3),
            labelled,
            ["classifier"],
        ),
    }
    for name, (model, rows, saved) in models.items():
        callback = LoraCallback(loralab.attach(model, LoRA(rank=2, modules_to_save=saved)))
        Trainer(
            model=model, args=arguments(tmp_path / "run", save_strategy="no"), train_dataset=rows, callbacks=[callback]
        ).train()
        assert callback.certificate is not None and callback.certificate.passed, name
        record = json.loads((tmp_path / "run" / RECORD).read_text())
        assert record["base"]["name"] == str(tmp_path / name) and "live" not in record["base"]
        assert record["certificate"]["max_logit_difference"] == 0


def test_a_base_that_is_not_the_one_it_names_is_not_certified(tmp_path: Path) -> None:
    base, other = tmp_path / "base", llama(2)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    other.save_pretrained(base)
    adapter = adapted(METHODS["plain"])
    adapter.model.config._name_or_path = str(base)
    trainer = Trainer(
        model=adapter.model,
        args=arguments(tmp_path / "run", save_strategy="no"),
        train_dataset=ROWS,
        callbacks=[LoraCallback(adapter)],
    )
    with pytest.raises(LoralabError):
        trainer.train()


def test_what_cannot_be_certified_is_said_before_training(tmp_path: Path) -> None:
    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(9, 4)

        def forward(self, input_ids: Any, labels: Any) -> dict[str, torch.Tensor]:
            return {"loss": self.up(input_ids.float()).square().mean()}

    adapter = loralab.attach(Toy(), LoRA(rank=2, target_modules=["up"]))
    callback = LoraCallback(adapter)
    trainer = Trainer(
        model=adapter.model, args=arguments(tmp_path, save_strategy="no"), train_dataset=ROWS, callbacks=[callback]
    )
    trainer.train()
    assert len(callback.notes) == 1 and callback.certificate is None
    assert (tmp_path / TENSORS).exists()


def test_mixed_precision_is_certified_without_its_autocast(tmp_path: Path) -> None:
    found = train(tmp_path, METHODS["plain"], certify=True, bf16=True)
    certificate = found.callback.certificate
    assert certificate is not None and certificate.precision == "fp32" and certificate.passed


def refused(tmp_path: Path, method: Any = METHODS["plain"], **options: Any) -> LoralabError:
    with pytest.raises(LoralabError) as caught:
        train(tmp_path / "refused", method, **options)
    return caught.value


def test_nothing_trains_and_more_trains_are_refused(tmp_path: Path) -> None:
    def frozen(model: Any) -> Any:
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
        return model

    def thawed(model: Any) -> Any:
        model.model.norm.requires_grad_(True)
        return model

    def another(model: Any) -> Any:
        return adapted(METHODS["plain"]).model

    assert refused(tmp_path, model=frozen).code == "nothing_trains"
    assert refused(tmp_path, model=thawed).code == "optimizer_holds_more"
    assert refused(tmp_path, model=another).code == "other_model"


def test_an_optimizer_that_holds_less_is_refused(tmp_path: Path) -> None:
    adapter = adapted(METHODS["plain"])
    optimizer = torch.optim.AdamW(adapter.parameters()[1:], lr=0.01)
    trainer = Trainer(
        model=adapter.model,
        args=arguments(tmp_path),
        train_dataset=ROWS,
        optimizers=(optimizer, None),
        callbacks=[LoraCallback(adapter)],
    )
    with pytest.raises(LearningError) as caught:
        trainer.train()
    assert caught.value.code == "optimizer_lacks"


def test_a_merged_adapter_is_not_trained(tmp_path: Path) -> None:
    adapter = adapted(METHODS["plain"])
    adapter.merge()
    trainer = Trainer(
        model=adapter.model, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[LoraCallback(adapter)]
    )
    with pytest.raises(AdapterStateError) as caught:
        trainer.train()
    assert caught.value.code == "merged"


def test_settings_that_a_method_cannot_have_are_refused(tmp_path: Path) -> None:
    plus = refused(tmp_path, replace(METHODS["plain"], lora_plus=8.0))
    assert (plus.code, plus.field) == ("lora_plus_not_used", "lora_plus")
    steps = refused(tmp_path, replace(METHODS["adalora"], total_steps=50))
    assert isinstance(steps, ConfigError)


def test_rates_of_lora_plus_are_the_optimizers(tmp_path: Path) -> None:
    adapter = adapted(replace(METHODS["plain"], lora_plus=8.0))
    named = adapter.named_parameters()
    groups = [
        {"params": [p for n, p in named.items() if n.endswith(end)], "lr": rate}
        for end, rate in (("lora_A", 0.001), ("lora_B", 0.008))
    ]
    Trainer(
        model=adapter.model,
        args=arguments(tmp_path),
        train_dataset=ROWS,
        optimizers=(torch.optim.AdamW(groups), None),
        callbacks=[LoraCallback(adapter, certify=False)],
    ).train()


class Break(TrainerCallback):
    """Spoils a step: what it does with the parameters of the first adapted layer."""

    def __init__(self, event: str, spoil: Any) -> None:
        setattr(self, event, lambda args, state, control, model, **_: spoil(model, state))


def test_runs_that_cannot_learn_stop_after_their_first_steps(tmp_path: Path) -> None:
    def drop(model: Any, state: Any) -> None:
        model.model.layers[1].mlp.up_proj.lora_B.grad = None

    def rest(model: Any, state: Any) -> None:
        layer = model.model.layers[1].mlp.up_proj
        layer.lora_B.data.zero_()

    def spoil(model: Any, state: Any) -> None:
        model.model.layers[1].mlp.up_proj.lora_B.grad.fill_(math.nan)

    def later(model: Any, state: Any) -> None:
        if state.global_step == 4:
            model.model.layers[1].mlp.up_proj.lora_B.data.fill_(math.nan)

    found = {}
    for event, what in {
        "on_step_end": later,
        "on_pre_optimizer_step": drop,
        "on_optimizer_step": rest,
        "on_substep_end": spoil,
    }.items():
        adapter = adapted(METHODS["plain"])
        place = "on_pre_optimizer_step" if what is spoil else event
        trainer = Trainer(
            model=adapter.model,
            args=arguments(tmp_path, save_strategy="no"),
            train_dataset=ROWS,
            callbacks=[Break(place, what), LoraCallback(adapter, certify=False)],
        )
        with pytest.raises(LearningError) as caught:
            trainer.train()
        found[what] = (caught.value.code, trainer.state.global_step)
    assert found[drop] == ("no_gradient", 0)
    assert found[spoil] == ("gradient_not_finite", 0)
    assert found[rest] == ("not_moved", 2)
    assert found[later][0] in ("loss_not_finite", "grad_norm_not_finite")
    assert found[later][1] == 5


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (LoRA(rank=2, target_modules=["q_proj"]), "other_settings"),
        (LoRA(rank=2, alpha=32), "other_settings"),
        (LoRA(rank=3), "other_settings"),
        (AdaLoRA(rank=2, target_rank=1), "other_settings"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(other: Any, code: str, tmp_path: Path) -> None:
    train(tmp_path / "run", METHODS["plain"])
    assert refused(tmp_path, other, resume=tmp_path / "run/checkpoint-2").code == code


def test_a_checkpoint_on_another_base_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", METHODS["plain"])

    def other(model: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return model

    caught = refused(tmp_path, model=other, resume=tmp_path / "run/checkpoint-2")
    assert (caught.code, caught.field) == ("other_base", "model")


def test_a_checkpoint_that_trainer_alone_wrote_is_not_resumed(tmp_path: Path) -> None:
    adapter = adapted(METHODS["plain"])
    Trainer(model=adapter.model, args=arguments(tmp_path), train_dataset=ROWS).train()
    with pytest.raises((ValueError, LoralabError)):
        train(tmp_path, METHODS["plain"], resume=tmp_path / "checkpoint-2")
    plain = llama(2).state_dict()
    torch.save(plain, tmp_path / "checkpoint-2/pytorch_model.bin")
    caught = refused(tmp_path, resume=tmp_path / "checkpoint-2")
    assert caught.code == "no_adapter_state"


@pytest.mark.parametrize("when", ["before attach", "after attach", "by Trainer"])
def test_compiled_training_is_the_same(when: str, tmp_path: Path) -> None:
    def compiled(model: Any) -> Any:
        return torch.compile(model, backend="eager")

    expected = train(tmp_path / "a", METHODS["plain"])
    options: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    if when == "by Trainer":
        options = {"torch_compile": True, "torch_compile_backend": "eager"}
    elif when == "after attach":
        options["model"] = compiled
    else:
        options["shell"] = compiled
    found = train(tmp_path / "b", METHODS["plain"], **options)
    close(found.adapter, expected.adapter)
    keys = load_file(tmp_path / "b" / TENSORS).keys()
    assert keys == load_file(tmp_path / "a" / TENSORS).keys()
    again = train(tmp_path / "c", METHODS["plain"], resume=tmp_path / "b/checkpoint-2", **options)
    assert same(again.adapter, found.adapter)


def test_after_training_the_model_is_its_own_again(tmp_path: Path) -> None:
    before = logits(llama(2))
    found = train(tmp_path, METHODS["plain"])
    assert not torch.allclose(logits(found.model.eval()), before, atol=1e-3)
    found.adapter.detach()
    assert torch.equal(found.model(IDS).logits, before)


def hooks_of(model: Any) -> int:
    return len(model._load_state_dict_pre_hooks) + len(model._load_state_dict_post_hooks)


@pytest.mark.parametrize("name", ["plain", "adalora"])
def test_no_hook_stays_on_the_model_and_its_trainer_can_still_go_on(name: str, tmp_path: Path) -> None:
    found = train(tmp_path, METHODS[name])
    assert hooks_of(found.model) == 0
    before = found.weights
    found.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert found.weights == before and hooks_of(found.model) == 0
    assert found.adapter.budget is None or int(found.adapter.budget.done) == 6
    train(tmp_path / "other", replace(METHODS[name], alpha=3))
    (tmp_path / "other/checkpoint-6").rename(tmp_path / "checkpoint-8")
    with pytest.raises(LoralabError) as caught:
        found.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert caught.value.code in ("other_settings", "no_adapter_state")


def test_the_callback_of_one_adapter_heeds_no_checkpoint_of_another(tmp_path: Path) -> None:
    train(tmp_path, METHODS["plain"])
    first = adapted(LoRA(rank=3))
    LoraCallback(first)  # whose training was cut off, say
    second = attach(first.model, METHODS["plain"], name="second")
    trainer = Trainer(
        model=first.model,
        args=arguments(tmp_path / "again"),
        train_dataset=ROWS,
        callbacks=[LoraCallback(second, certify=False)],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.json", "optimizer.pt"])
def test_a_checkpoint_that_was_cut_off_is_not_resumed(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", METHODS["plain"])
    if file == "model.safetensors":  # killed before the callback's own part is there
        real = atomic.write_file

        def cut(path: Path, *rest: Any) -> None:
            if path.name == file and path.parent.name == "checkpoint-4":
                raise KeyboardInterrupt
            real(path, *rest)

        monkeypatch.setattr(atomic, "write_file", cut)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", METHODS["plain"])
        monkeypatch.undo()
    else:
        train(tmp_path / "cut", METHODS["plain"])
        (tmp_path / "cut/checkpoint-4" / file).write_bytes(b"")
    with pytest.raises((ValueError, EOFError, RuntimeError, LoralabError)):
        train(tmp_path / "cut", METHODS["plain"], resume=tmp_path / "cut/checkpoint-4")
    again = train(tmp_path / "cut", METHODS["plain"], resume=tmp_path / "cut/checkpoint-2")
    assert again.weights == whole.weights
