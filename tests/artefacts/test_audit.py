"""Engines that compute the same agree, whatever they round; one that does not is named, with the cause."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts.conftest import MakeAdapter

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA, Method, Prefix
from loralab.artefacts.audit import engines
from loralab.artefacts.audit.answers import Answers, answers_of, distance
from loralab.artefacts.audit.audit import audit
from loralab.artefacts.audit.engines import ENGINES, Engine, Question
from loralab.artefacts.audit.gguf_base import write_base
from loralab.artefacts.audit.report import AGREES, DIFFERS, NO_ANSWER, NOT_INSTALLED, EngineVerdict
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.cli import run
from loralab.errors import AdapterFileError, ConfigError
from loralab.models import load as models
from loralab.serving.audit_answers import PIECE, answer
from loralab.tasks.samples import MAX_POSITIONS

Ask = Callable[[Question], Answers]
Judge = Callable[[Ask], EngineVerdict]
METHODS: dict[str, Method] = {
    "plain": LoRA(rank=2),
    "rslora": LoRA(rank=4, alpha=4, scaling="alpha/sqrt(r)"),
    "dora": LoRA(rank=2, dora=True),
    "patterns": LoRA(rank=4, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
}


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server's process does, done here: a process takes seconds to load its libraries."""

    def compute(command: Any, asked: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"values": torch.cat(answer(**asked)).double().log_softmax(dim=1)}

    monkeypatch.setattr(engines, "_in_subprocess", compute)
    for name in ("LORALAB_VLLM_PYTHON", "LORALAB_LLAMA_PYTHON"):
        monkeypatch.delenv(name, raising=False)


def plant(monkeypatch: pytest.MonkeyPatch, ask: Ask, **more: Any) -> None:
    own = Engine(ask=ask, python=lambda: "python", install="pip install it", **more)
    monkeypatch.setitem(ENGINES, "planted", own)


@pytest.fixture
def judged(make_adapter: MakeAdapter, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Return the verdict on an engine that answers as a function does."""

    def judge(ask: Ask) -> EngineVerdict:
        plant(monkeypatch, ask)
        (verdict,) = audit(make_adapter(tiny_llama_folder), engines=["planted"]).engines
        return verdict

    return judge


def scaled(factor: float) -> Ask:
    def ask(question: Question) -> Answers:
        live = load_with_base(question.adapter or "", model=question.base, precision=question.precision)
        for layer in live.adapter.modules.values():
            layer.scaling *= factor
        return answers_of(logits_of(live.base.model, question.prompts, "causal-lm"))

    return ask


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_honest_engines_agree(name: str, precision: str, make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    report = audit(make_adapter(tiny_llama_folder, METHODS[name]), engines=["ours", "peft"], precision=precision)
    assert [own.verdict for own in report.engines] == [AGREES, AGREES]
    assert report.passed
    assert report.positions == sum(4 + 3 * row for row in range(5))


def test_prompts_longer_than_what_is_compared(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    live = load_with_base(make_adapter(tiny_llama_folder), precision="fp32")
    prompts = [[5 + n % 60 for n in range(length)] for length in (3 * PIECE + MAX_POSITIONS, 4)]
    asked = {"base": str(tiny_llama_folder), "adapter": str(live.stored.path), "prompts": prompts}
    found = torch.cat(answer(**asked, precision="fp32", positions=MAX_POSITIONS))
    torch.testing.assert_close(found, logits_of(live.base.model, prompts, "causal-lm"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.5, 2.0, 2**-0.5])
def test_a_wrong_scale_is_named(
    factor: float, make_adapter: MakeAdapter, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, scaled(factor))
    report = audit(make_adapter(tiny_llama_folder), engines=["ours", "planted"])
    honest, planted = report.engines
    assert honest.verdict == AGREES
    assert (planted.verdict, planted.cause) == (DIFFERS, "scaled")
    assert planted.factor == pytest.approx(factor)
    assert report.decided
    assert not report.passed


def test_an_adapter_that_is_left_out_is_named(judged: Judge) -> None:
    planted = judged(lambda question: ENGINES["ours"].ask(replace(question, adapter=None)))
    assert (planted.verdict, planted.cause) == (DIFFERS, "adapter_left_out")


def test_a_base_that_differs_already_is_named(judged: Judge) -> None:
    def ask(question: Question) -> Answers:
        own = ENGINES["ours"].ask(question).values
        return Answers(values=(own + torch.randn(own.shape, generator=torch.Generator().manual_seed(0))).log_softmax(1))

    planted = judged(ask)
    assert (planted.verdict, planted.cause) == (DIFFERS, "base_differs")


def test_what_is_wrong_at_one_place_alone_is_found(judged: Judge) -> None:
    def ask(question: Question) -> Answers:
        own = ENGINES["ours"].ask(question).values.clone()
        own[3] = ENGINES["ours"].ask(replace(question, adapter=None)).values[3]
        return Answers(values=own)

    assert judged(ask).verdict == DIFFERS


def test_an_adapter_without_effect_decides_nothing(tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = models.load(str(tiny_llama_folder))
    attach(base.model, LoRA(rank=2)).save(tmp_path / "new", {"base": {"name": base.name}})
    report = audit(tmp_path / "new", engines=["ours"])
    assert report.undecidable == ("fp32",)
    assert not report.decided
    assert run(["audit", str(tmp_path / "new"), "--engines", "ours"]) == 3


def test_who_is_not_installed_is_named_and_who_fails_is_not_taken_for_wrong(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    missing = Engine(ask=ENGINES["ours"].ask, python=lambda: None, install="pip install missing")
    monkeypatch.setitem(ENGINES, "missing", missing)
    report = audit(adapter, engines=["ours", "missing"])
    assert [own.verdict for own in report.engines] == [AGREES, NOT_INSTALLED]
    assert report.engines[1].detail == missing.install
    assert report.passed

    def fails(question: Question) -> Answers:
        raise RuntimeError("no kernel")

    plant(monkeypatch, fails)
    report = audit(adapter, engines=["ours", "planted"])
    assert [own.verdict for own in report.engines] == [AGREES, NO_ANSWER]
    assert (report.decided, report.passed) == (False, False)
    plant(monkeypatch, lambda question: Answers(values=torch.zeros(3, 5)))
    assert audit(adapter, engines=["planted"]).engines[0].verdict == NO_ANSWER


def test_a_prefix_is_compared_too(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    report = audit(make_adapter(tiny_llama_folder, Prefix(tokens=3)), engines=["ours", "peft"])
    assert [own.verdict for own in report.engines] == [AGREES, AGREES]


def test_the_command_writes_its_report(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(make_adapter(tiny_llama_folder))
    plant(monkeypatch, scaled(2.0))
    place = tmp_path / "report"
    assert run(["audit", adapter, "--engines", "ours,peft", "--output", str(place), "--json"]) == 0
    assert {file.name for file in place.iterdir()} == {"audit.html", "audit.json"}
    assert run(["audit", adapter, "--engines", "ours,planted", "--output", str(place)]) == 1
    assert "planted" in (place / "audit.html").read_text(encoding="utf-8")


def test_wrong_input_is_refused(make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama_folder)
    for options, code in (({"engines": ["sglang"]}, "unknown_engine"), ({"engines": []}, "missing_option")):
        with pytest.raises(ConfigError) as caught:
            audit(adapter, **options)  # type: ignore[arg-type]
        assert caught.value.code == code
    with pytest.raises(AdapterFileError):
        audit(tmp_path / "nowhere")
    assert run(["audit", str(adapter), "--engines", "sglang"]) == 2
    assert run(["audit", str(adapter), "--precision", "fp8"]) == 2


def test_what_is_not_listed_counts_as_one_outcome() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = (answers_of(3 * torch.randn(7, 200, generator=draw)) for _ in range(2))
    whole = distance(p.values, q)
    for count, least in ((200, 1.0), (150, 0.7)):  # putting outcomes together can only bring them nearer
        values, indices = q.values.topk(count, dim=1)
        part = distance(p.values, Answers(values=values, indices=indices))
        assert least * whole.mean_kl <= part.mean_kl * (1 + 1e-9)
        assert part.mean_kl <= whole.mean_kl * (1 + 1e-9)
        assert part.top1 == whole.top1
    assert distance(p.values, p).worst_kl == 0
    broken = Answers(values=torch.full((7, 200), torch.nan))
    assert distance(p.values, broken).mean_kl == torch.inf


def test_a_base_for_llama_cpp_reads_back(tiny_llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    write_base(tmp_path / "base.gguf", model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
    ids = [[3, 7, 1, 9, 12, 5]]
    assert torch.equal(logits_of(again, ids, "causal-lm"), logits_of(model, ids, "causal-lm"))


def test_a_rank_that_vllm_has_no_buffer_for_ends_its_answer_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 600}')
    question = Question(base="x", adapter=tmp_path, record={}, prompts=[[1]], precision="fp32")
    assert "600" in str(engines.answer(ENGINES["vllm"], question))
