"""Every method through train(): it learns, resumes in the same bytes, and reloads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.adapters import folder
from loralab.adapters.load import load
from loralab.adapters.methods import AdaLoRA, Bottleneck, FullFineTune, LoRA, Prefix
from loralab.adapters.registry import built_in
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.errors import ConfigError
from loralab.training.evaluation import evaluate, generate
from loralab.training.plan import plan
from loralab.training.request import Request
from loralab.training.run import Run, run_request, train
from loralab.training.settings import Evaluation, Training

KINDS: dict[str, Any] = {
    **{name: spec.config() for name, spec in built_in().items()},
    "adalora": AdaLoRA(rank=4, target_rank=2),
    "dora": LoRA(rank=2, dora=True),
    "pissa": LoRA(rank=2, init="pissa"),
    "lora+": LoRA(rank=2, lora_plus=8),
    "parallel": Bottleneck(placement="parallel", width=4),
    "prefix-mlp": Prefix(tokens=4, mlp=True, mlp_width=8),
}
ON_LLAMA = [name for name in KINDS if name not in ("bitfit",)]
ON_BERT = list(KINDS)
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 4,
    "max_length": 64,
    "max_steps": 10,
    "save_every": 2,
    "evaluation_rows": 4,
}


class Killed(BaseException):
    """Stands for a process that ends between two events."""


def kill_at(step: int) -> Any:
    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise Killed

    return listen


def files(run: Run) -> dict[str, bytes]:
    return {name: (run.output_dir / name).read_bytes() for name in (folder.TENSORS, folder.CONFIG)}


def check_method(method: Any, model: Path, data: Path, place: Path) -> Run:
    """Train, kill, resume, reload, evaluate."""

    def start(name: str, **options: Any) -> Run:
        request = Request.of(str(model), str(data), method, Training(**SETTINGS), None)
        return run_request(request, place / name, **options)

    run = start("whole")
    with pytest.raises(Killed):
        start("cut", listener=kill_at(5))
    assert files(start("cut", resume=True)) == files(run)
    live = load_with_base(run.output_dir)
    sample = run.sample
    want = logits_of(run.base.model, sample, run.base.kind)
    assert torch.equal(logits_of(live.base.model, sample, run.base.kind), want)
    again = evaluate(data=str(data), adapter=run.output_dir, evaluation=Evaluation(split="validation", limit=4))
    assert again.metrics["loss"] == pytest.approx(run.scores["validation"].metrics["loss"])
    return run


@pytest.mark.parametrize("kind", ON_LLAMA)
def test_on_a_language_model(kind: str, tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    check_method(KINDS[kind], tiny_llama_folder, sums, tmp_path)


@pytest.mark.parametrize("kind", ON_BERT)
def test_on_a_classifier(kind: str, tiny_bert_folder: Path, labelled: Path, tmp_path: Path) -> None:
    check_method(KINDS[kind], tiny_bert_folder, labelled, tmp_path)


def test_adalora_ends_at_its_target(tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    run = train(
        model=str(tiny_llama_folder),
        data=str(sums),
        method=KINDS["adalora"],
        output_dir=tmp_path / "run",
        training=Training(**SETTINGS),
    )
    assert run.adapter.budget is not None
    assert sum(run.adapter.budget.ranks.values()) == 2 * len(run.adapter.modules)
    stored = folder.read(run.output_dir)
    ranks = [len(t) for key, t in stored.tensors.items() if key.endswith("lora_A.weight")]
    assert sum(ranks) == 2 * len(run.adapter.modules)


@pytest.mark.parametrize("kind", ["lora", "prefix", "bottleneck"])
def test_a_fresh_process_gives_the_same_logits(kind: str, tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    run = train(
        model=str(tiny_llama_folder),
        data=str(sums),
        method=KINDS[kind],
        output_dir=tmp_path / "run",
        training=Training(**{**SETTINGS, "max_steps": 3}),
    )
    assert run.certificate is not None and run.certificate.max_logit_difference == 0


@pytest.mark.parametrize("kind", ON_LLAMA)
def test_the_plan_counts_what_is_trained(kind: str, tiny_llama_folder: Path, sums: Path) -> None:
    made = plan(model=str(tiny_llama_folder), data=str(sums), method=KINDS[kind], training=Training(**SETTINGS))
    assert sum(module.parameters for module in made.modules) == made.trainable > 0


def test_the_usual_rate_is_written_down(tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    train(
        model=str(tiny_llama_folder),
        data=str(sums),
        method=Prefix(tokens=2),
        output_dir=tmp_path / "run",
        training=Training(**{**SETTINGS, "max_steps": 1}),
    )
    text = (tmp_path / "run" / "config.toml").read_text()
    assert "learning_rate = 0.01" in text
    assert 'method = "prefix"' in text


def test_every_variant_is_a_method_with_options_it_has() -> None:
    for spec in built_in().values():
        known = {*spec.config.__dataclass_fields__, *Training.__dataclass_fields__}
        for options in spec.variants.values():
            assert set(options) <= known


class TestNewTokens:
    def run(self, model: Path, place: Path, **options: Any) -> Run:
        data = place / "data.jsonl"
        rows = [{"prompt": f"<tool> {n} good", "completion": "</tool> bad"} for n in range(40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return train(
            model=str(model),
            data=str(data),
            method=LoRA(rank=2),
            output_dir=place / "run",
            training=Training(**{**SETTINGS, "max_steps": 4}, **options),
        )

    tokens = ("<tool>", "</tool>")

    def test_they_are_trained_saved_and_found_again(self, tiny_llama_folder: Path, tmp_path: Path) -> None:
        run = self.run(tiny_llama_folder, tmp_path, new_tokens=self.tokens)
        ids = run.base.tokenizer.convert_tokens_to_ids(list(self.tokens))
        stored = folder.read(run.output_dir)
        assert stored.config.token_rows == tuple(ids)
        live = load_with_base(run.output_dir)
        assert live.base.tokenizer.convert_tokens_to_ids(list(self.tokens)) == ids
        sample = run.sample
        assert ids[0] in {number for prompt in sample for number in prompt}
        want = logits_of(run.base.model, sample, run.base.kind)
        assert torch.equal(logits_of(live.base.model, sample, run.base.kind), want)
        found = generate(prompts=["<tool> 3"], adapters=[run.output_dir], max_new_tokens=2)
        assert set(found[0]["answers"]) == {"base", str(run.output_dir)}

    def test_what_is_no_new_token_is_refused(self, tiny_llama_folder: Path, tmp_path: Path) -> None:
        for tokens in (("good",), ("<tool>", "<tool>"), (" ",)):
            with pytest.raises(ConfigError) as error:
                self.run(tiny_llama_folder, tmp_path, new_tokens=tokens)
            assert (error.value.code, error.value.field) == ("invalid_value", "new_tokens")
        with pytest.raises(ConfigError) as error:
            self.run(tiny_llama_folder, tmp_path, new_tokens=("<never>",))
        assert (error.value.code, error.value.field) == ("no_row_with_token", "token_rows")


@pytest.mark.parametrize("how", ["nf4"])
@pytest.mark.filterwarnings("ignore::loralab.errors.BaseMismatchWarning")
def test_a_packed_base_is_packed_again_on_loading(
    how: str, tiny_llama_folder: Path, sums: Path, tmp_path: Path
) -> None:
    run = train(
        model=str(tiny_llama_folder),
        data=str(sums),
        method=LoRA(rank=2),
        output_dir=tmp_path / "run",
        training=Training(**SETTINGS, quantize=how),
    )
    live = load_with_base(run.output_dir)
    want = logits_of(run.base.model, run.sample, run.base.kind)
    assert torch.equal(logits_of(live.base.model, run.sample, run.base.kind), want)
    plain = load_with_base(run.output_dir, model=str(tiny_llama_folder))
    assert plain.stored.record["base"]["quantize"] == how
    with pytest.raises(ConfigError) as error:
        train(
            model=str(tiny_llama_folder),
            data=str(sums),
            method=FullFineTune(),
            output_dir=tmp_path / "full",
            training=Training(**SETTINGS, quantize=how),
        )
    assert (error.value.code, error.value.field) == ("trains_quantized", "quantize")
    fresh = load_with_base(run.output_dir)
    assert load is not None
    assert fresh.base.model is not live.base.model
