"""check(): every method at every engine, and the way out that is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.adapters import folder
from loralab.adapters.folder import RECORD
from loralab.adapters.methods import IA3, AdaLoRA, BitFit, Bottleneck, FullFineTune, LoRA, Prefix, Prompt
from loralab.artefacts.engines import allowed_rank, check
from loralab.artefacts.export import export
from loralab.artefacts.export_copies import prepare
from loralab.cli import run
from loralab.errors import AdapterFileError, ConfigError, ModelError
from loralab.models.kinds import CLASSIFIER

MakeAdapter = Callable[..., Path]
MERGE, EXPORT, NONE, NOTHING = ["merge"], ["export"], ["none"], list[str]()
HEAD, TABLE = ["lm_head"], ["embed_tokens"]
CASES: dict[str, tuple[Any, list[str], list[str], list[str]]] = {  # at vLLM, llama.cpp, peft
    "lora": (LoRA(rank=2), NOTHING, NOTHING, NOTHING),
    "rslora": (LoRA(rank=2, scaling="alpha/sqrt(r)"), NOTHING, NOTHING, NOTHING),
    "pissa": (LoRA(rank=2, init="pissa"), NOTHING, NOTHING, NOTHING),
    "ranks": (LoRA(rank=2, rank_pattern={"v_proj": 4}), EXPORT, NOTHING, NOTHING),
    "alphas": (LoRA(rank=2, alpha_pattern={"v_proj": 4}), EXPORT, NOTHING, NOTHING),
    "adalora": (AdaLoRA(rank=2, target_rank=1, total_steps=9), NOTHING, NOTHING, NOTHING),
    "dora": (LoRA(rank=2, dora=True), MERGE, MERGE, NOTHING),
    "wide": (LoRA(rank=600, target_modules=["q_proj"]), MERGE, NOTHING, NOTHING),
    "head": (LoRA(rank=2, target_modules=HEAD), NOTHING, MERGE, NOTHING),
    "embedding": (LoRA(rank=2, target_modules=TABLE), NOTHING, MERGE, NOTHING),
    "in full": (LoRA(rank=2, modules_to_save=HEAD), MERGE, MERGE, NOTHING),
    "rows": (LoRA(rank=2, token_rows=(3, 7)), MERGE, MERGE, NOTHING),
    "ia3": (IA3(), MERGE, MERGE, NOTHING),
    "prefix": (Prefix(tokens=2), NONE, NONE, NOTHING),
    "prompt": (Prompt(tokens=2), NONE, NONE, NOTHING),
    "bottleneck": (Bottleneck(width=2), NONE, NONE, NONE),
    "full": (FullFineTune(layers=(0,)), MERGE, MERGE, MERGE),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_in_the_way(make_adapter: MakeAdapter, tiny_llama_folder: Path, case: str) -> None:
    method, *expected = CASES[case]
    adapter = make_adapter(tiny_llama_folder, method)
    for target, ways in zip(("vllm", "gguf", "peft"), expected, strict=True):
        verdict = check(adapter, target=target)
        assert [one.remedy for one in verdict.obstacles] == ways, target
        assert verdict.as_it_is == (not ways)


def test_bases_that_are_not_known(make_adapter: MakeAdapter, tiny_gpt2_folder: Path, tiny_bert_folder: Path) -> None:
    on_gpt2 = make_adapter(tiny_gpt2_folder, LoRA(rank=2), name="a")
    verdict = check(on_gpt2, target="vllm")
    assert "GPT2LMHeadModel" in verdict.obstacles[0].what
    verdict = check(on_gpt2, target="gguf")
    assert "GPT2LMHeadModel" in verdict.obstacles[0].what
    labels = ["a", "b"]
    on_bert = make_adapter(tiny_bert_folder, BitFit(), name="b", kind=CLASSIFIER, labels=labels)
    assert check(on_bert, target="vllm").lasting
    (on_gpt2 / RECORD).unlink()  # nothing names a base now but peft's own field
    assert check(on_gpt2, target="vllm", model=str(tiny_gpt2_folder)).lasting
    with pytest.raises(ModelError) as error:
        check(on_gpt2, target="vllm", model="nowhere")
    assert (error.value.code, error.value.field) == ("unknown_model", "model")


def test_a_packed_base_is_another_base(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    adapter = make_adapter(tiny_llama_folder)
    for how, at_vllm, at_llama in (("nf4", MERGE, MERGE), ("gguf", MERGE, NOTHING)):
        base = {**folder.read(adapter).record["base"], "quantize": how}
        folder.update_record(adapter, base=base)
        for target, ways in (("vllm", at_vllm), ("gguf", at_llama)):
            found = check(adapter, target=target)
            assert [one.remedy for one in found.obstacles] == ways, (how, target)


def test_a_rank_that_vllm_must_be_told_of(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    verdict = check(make_adapter(tiny_llama_folder, LoRA(rank=20)), target="vllm")
    assert verdict.as_it_is
    assert "--max-lora-rank 32" in verdict.notes[0]
    assert [allowed_rank(rank) for rank in (1, 8, 9, 300, 512)] == [8, 8, 16, 320, 512]


@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_what_cannot_be_written_is_refused_with_the_way_out(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, target: str
) -> None:
    dora = make_adapter(tiny_llama_folder, LoRA(rank=2, dora=True), name="dora")
    with pytest.raises(ConfigError) as error:
        export(dora, tmp_path / "out", to=target)
    assert (error.value.code, error.value.field) == ("not_exportable", "target")
    prefix: Any = Prefix(tokens=2)
    with pytest.raises(ConfigError) as error:
        export(make_adapter(tiny_llama_folder, prefix), tmp_path / "out", to=target)
    assert (error.value.code, error.value.field) == ("not_exportable", "target")
    assert not list(tmp_path.glob("out*"))


def test_wrong_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check(tmp_path, target="vlm")
    assert (error.value.code, error.value.field) == ("unknown_target", "target")
    with pytest.raises(AdapterFileError) as error:
        check(tmp_path, target="vllm")
    assert (error.value.code, error.value.field) == ("no_adapter", "path")


def test_the_exit_code_says_whether_it_goes_as_it_is(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_adapter(tiny_llama_folder, LoRA(rank=20), name="plain")
    uneven = make_adapter(tiny_llama_folder, LoRA(rank=2, rank_pattern={"v_proj": 3}), name="u")
    assert run(["check", str(plain), "--for", "vllm"]) == 0
    assert "--max-lora-rank 32" in capsys.readouterr().out
    assert run(["check", str(uneven), "--for", "vllm", "--json"]) == 1
    assert '"remedy": "export"' in capsys.readouterr().out
    assert run(["check", str(uneven), "--for", "ollama"]) == 2


def test_a_store_is_prepared_once(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    methods: dict[str, Any] = {
        "uneven": LoRA(rank=2, rank_pattern={"v_proj": 17}),
        "prompt": Prompt(tokens=2),
        "plain": LoRA(rank=1),
    }
    given = {name: make_adapter(tiny_llama_folder, m, name=name) for name, m in methods.items()}
    (tmp_path / "broken").mkdir()
    found = prepare({**given, "broken": tmp_path / "broken"}, str(tiny_llama_folder))
    assert list(found.ready) == ["uneven", "plain"]
    assert found.rank == 32
    assert "Prompt" in found.refused["prompt"]
    assert "broken" in found.refused
    assert folder.read(found.ready["uneven"]).fields["r"] == 17
    before = (found.ready["uneven"] / RECORD).stat().st_mtime_ns
    again = prepare(given, str(tiny_llama_folder))
    assert again.ready == found.ready
    assert (again.ready["uneven"] / RECORD).stat().st_mtime_ns == before
