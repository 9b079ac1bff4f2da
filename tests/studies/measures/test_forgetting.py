"""Forgetting: the loss on other text, and a probe that is fitted to the base alone."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from studies.conftest import Here, planted, setup_of
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from loralab.adapters.attach import attach
from loralab.adapters.methods import FullFineTune, LoRA, Prefix, Prompt
from loralab.errors import ConfigError, InputError, ModelError
from loralab.models.load import Base, load
from loralab.studies import store
from loralab.studies.catalog import setup
from loralab.studies.evidence import Metric, forgetting_of, scores_table
from loralab.studies.measures import forgetting
from loralab.studies.measures.forgetting import again, digest_of, general_task, measured, untrained
from loralab.studies.message import Message
from loralab.studies.prepare import prepare
from loralab.studies.study import Arm, Record, StudyOptions, Trial
from loralab.studies.trained import MEASURE
from loralab.studies.trained import measured as measure_trial
from loralab.tasks.catalog import TASKS, find
from loralab.tasks.forward import answer_loss

WORDS = ["good", "bad", "fine", "poor", "great", "awful", "film"]


@pytest.fixture(scope="module")
def general_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write plain text of words that the sums do not have."""
    draw = random.Random(1)
    file = tmp_path_factory.mktemp("general") / "general.txt"
    lines = {" ".join(draw.choices(["film", "the", "a"], k=5 + n % 5)) for n in range(120)}
    file.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts of another task: their label is their first word."""
    draw = random.Random(2)
    rows = [(draw.choice(["good", "bad"]), " ".join(draw.choices(WORDS, k=3)), n) for n in range(300)]
    file = tmp_path_factory.mktemp("labelled") / "other.csv"
    lines = [f"{first} {first} {rest} {n % 60} {n // 60},{first}" for first, rest, n in rows]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return file


def loss_by_hand(base: Base, texts: list[str]) -> float:
    """Return the loss of every text alone, each token but the first predicted from those before it."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*base.tokenizer(text)["input_ids"], base.tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = base.model(input_ids=ids).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def train_by_hand(base: Base, file: Path, rate: float, steps: int = 20) -> None:
    """Take a few steps on the rows of a file."""
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    examples = find(str(file)).encode(base.tokenizer, "train", kind=base.kind)[:16]
    ids = [torch.tensor([e.input_ids]) for e in examples]
    for _ in range(steps):
        optimiser.zero_grad()
        for one in ids:
            answer_loss(base.model, {"input_ids": one, "labels": one}, base.kind)[0].backward()
        optimiser.step()


def test_the_loss_is_that_of_every_text_alone(tiny_llama_folder: Path, general_file: Path, sums_file: Path) -> None:
    base, own = load(str(tiny_llama_folder)), find(str(sums_file))
    general = general_task(own, base.kind, str(general_file))
    texts = [row["text"] for row in general.splits["test"]]
    assert len(set(texts)) == len(texts) == forgetting.TEXT_ROWS
    expected = loss_by_hand(base, texts)
    bare = untrained(base, general)
    assert (bare.seen.value, again(base, general, bare).value) == pytest.approx((expected, expected), abs=1e-5)
    attach(base.model, LoRA(rank=2))
    tiny.fill(next(iter(forgetting.adapters_of(base.model).members.values())), 0)
    found = untrained(base, general).seen.value, again(base, general, bare).value
    assert found == pytest.approx((expected, loss_by_hand(base, texts)), abs=1e-5)
    assert abs(found[1] - found[0]) > 1e-3


@pytest.mark.parametrize("method", [FullFineTune(), LoRA(rank=4)], ids=["full", "lora"])
def test_training_on_other_text_raises_the_general_loss(
    method: Any, tiny_llama_folder: Path, general_file: Path, sums_file: Path
) -> None:
    base, own = load(str(tiny_llama_folder)), find(str(sums_file))
    untouched = measured(base, own, str(general_file)).numbers["general_before"]
    attach(base.model, method)
    seen = measured(base, own, str(general_file))
    numbers, texts = seen.numbers, seen.texts
    assert numbers["general_before"] == numbers["general_after"] == pytest.approx(untouched)
    assert texts == {"general": str(general_file), "general_kind": "loss"}
    train_by_hand(base, sums_file, 1e-2)
    trained = measured(base, own, str(general_file)).numbers
    assert trained["general_before"] == pytest.approx(untouched)  # the adapter is left out
    assert trained["general_after"] > untouched + 0.1
    found = measured(base, own, str(general_file))
    assert found.numbers["general_after"] == trained["general_after"]
    assert len(found.items["general"]) == forgetting.TEXT_ROWS
    assert -np.mean(found.items["general"]) == pytest.approx(
        trained["general_after"], rel=0.2
    )  # rows are of all lengths


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), FullFineTune(), Prefix(tokens=2), Prompt(tokens=2)], ids=lambda m: type(m).__name__
)
def test_a_probe_sees_no_difference_where_nothing_was_trained_and_one_where_the_states_moved(
    method: Any, deep_bert_folder: Path, labelled_file: Path, noise_file: Path
) -> None:
    base, own = load(str(deep_bert_folder), labels=["negative", "positive"]), find(str(noise_file))
    general = general_task(own, base.kind, str(labelled_file))
    assert {name: len(rows) for name, rows in general.splits.items()} == {"train": 100, "test": 30}
    bare = untrained(base, general)
    assert bare.seen == again(base, general, bare)
    assert bare.seen.value > 0.8
    adapter = attach(base.model, method)
    assert untrained(base, general).seen == bare.seen
    if type(method) in (LoRA, FullFineTune):
        assert again(base, general, bare) == bare.seen
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    assert untrained(base, general).seen == bare.seen != again(base, general, bare)


def test_the_base_is_measured_once_for_all_that_stand_beside_each_other(
    tiny_bert_folder: Path, labelled_file: Path, noise_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own = load(str(tiny_bert_folder), labels=["negative", "positive"]), find(str(noise_file))
    counted: list[str] = []
    monkeypatch.setattr(forgetting, "untrained", lambda b, g: counted.append(g.digest) or untrained(b, g))
    attach(base.model, LoRA(rank=2))
    tiny.fill(next(iter(forgetting.adapters_of(base.model).members.values())), 0)

    def found(name: str, **fields: object) -> dict[str, float]:
        arm = Arm(name=name, fields={"rank": len(name), **fields})
        trial = Trial(measure=MEASURE, setup=setup_of("rank", tiny_bert_folder, noise_file), arm=arm, seed=0)
        numbers = measured(base, own, str(labelled_file), (tmp_path / name, trial)).numbers
        return {key: value for key, value in numbers.items() if key != "general_seconds"}

    assert found("r") == found("rank")
    assert len(counted) == 1
    assert found("r", quantize="nf4").keys() == found("r").keys()  # another base: the same rows are measured anew
    assert len(counted) == 2


class Bare(torch.nn.Module):
    """A model that gives logits alone."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_probe_reads_the_states_without_padding(tiny_bert_folder: Path) -> None:
    base = load(str(tiny_bert_folder), labels=["a", "b"])
    ids, mask = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        found = forgetting.pooled(base.model, {"input_ids": ids, "attention_mask": mask})
        alone = base.model.base_model(input_ids=ids[:1, :3]).last_hidden_state.mean(dim=1)
    assert torch.allclose(found[:1], alone, atol=1e-5)
    assert found.shape == (2, base.model.config.hidden_size)
    assert not base.model.base_model._forward_hooks
    with pytest.raises(ModelError) as error:
        forgetting.pooled(Bare(), {"input_ids": ids})
    assert error.value.code == "no_hidden_states"


def test_the_probe_is_a_ridge_regression() -> None:
    draw = np.random.default_rng(0)
    states, labels = draw.normal(size=(40, 7)), draw.integers(0, 3, 40)
    *weights, bias = forgetting.fitted(states, labels, 3)
    mean, scale = states.mean(axis=0), states.std(axis=0)
    inputs, targets = (states - mean) / scale, np.eye(3)[labels]
    kept = inputs.T @ inputs + forgetting.PENALTY * 7 * np.eye(7)
    expected = np.linalg.solve(kept, inputs.T @ (targets - targets.mean(axis=0)))
    assert np.allclose(states @ weights + bias, inputs @ expected + targets.mean(axis=0), atol=1e-4)


def test_a_vision_model_is_probed_with_other_pictures(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    base, own = load(str(tmp_path), labels=["0", "1"], image_size=28), find("digits")
    attach(base.model, LoRA(rank=2))
    seen = measured(base, own, str(pictures))
    numbers, texts = seen.numbers, seen.texts
    assert seen.items["general"] and set(seen.items["general"]) == {1.0}
    assert numbers["general_before"] == numbers["general_after"] == 1.0
    assert texts["general_kind"] == "accuracy"
    assert measured(base, find(str(pictures))).texts["general"] == "digits"


def test_the_tasks_own_data_is_no_general_text(
    tmp_path: Path, labelled_file: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = find(str(labelled_file))
    copy = shutil.copy(labelled_file, tmp_path / "copy.csv")
    for kind in ("causal-lm", "sequence-classification"):
        with pytest.raises(ConfigError) as error:
            general_task(own, kind, str(copy))
        assert (error.value.code, error.value.field) == ("own_data", "general")
    with pytest.raises(ConfigError) as error:
        general_task(find(str(noise_file)), "image-classification", str(labelled_file))
    assert (error.value.code, error.value.field) == ("general_unsuited", "general")
    lines = noise_file.read_text(encoding="utf-8").splitlines()
    mixed = tmp_path / "mixed.csv"
    mixed.write_text("\n".join([*lines, *labelled_file.read_text(encoding="utf-8").splitlines()[1:20]]) + "\n")
    rest = general_task(own, "causal-lm", str(mixed))
    assert not {row["text"] for row in rest.splits["test"]} & {
        row["text"] for rows in own.splits.values() for row in rows
    }


class Lying:
    """A named task whose data lies in a file, or nowhere."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def locate(self) -> Path | None:
        return self.file

    def load(self, file: Path) -> Any:
        return forgetting.catalog.table_of(str(file))[0]

    def get(self) -> str:
        return "ask for it"

    instruction = ""


def test_of_packaged_data_the_first_that_is_here_and_not_the_tasks_own_is_taken(
    labelled_file: Path, general_file: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = forgetting.TEXTS
    known: dict[str, Any] = {first: Lying(labelled_file), second: Lying(general_file)}
    for module in ("loralab.tasks.catalog", "loralab.studies.measures.forgetting"):
        monkeypatch.setattr(f"{module}.TASKS", known)
    other, own = find(str(noise_file)), find(str(labelled_file))
    assert general_task(other, "causal-lm").name == str(labelled_file)
    assert general_task(own, "causal-lm").name == str(general_file)
    known[first] = Lying(None)
    assert general_task(other, "causal-lm").name == str(general_file)
    known[second] = Lying(None)
    with pytest.raises(ConfigError) as error:
        general_task(other, "causal-lm")
    assert error.value.code == "no_general" and "ask for it" in str(error.value)
    assert digest_of(other, "causal-lm", "") == ""
    with pytest.raises(InputError):
        digest_of(other, "causal-lm", "not/there.txt")


def test_a_record_holds_both_numbers_or_says_why_not(
    here: Here, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, labelled_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arm = Arm(name="a", fields={"method": "lora", "rank": 2, "learning_rate": 1e-2})
    own = setup_of("rank", tiny_bert_folder, noise_file, general=str(labelled_file))
    trial = Trial(measure=MEASURE, setup=own, arm=arm, seed=0)
    record = measure_trial(trial, tmp_path / "one", lambda event: None)
    assert record.texts["general_kind"] == "accuracy"
    said = forgetting_of([record])
    assert said is not None
    assert said.key == "forgetting.accuracy"
    assert said.values["after"] == record.numbers["general_after"]
    for names in ("TEXTS", "TEXT_TASKS"):
        monkeypatch.setattr(forgetting, names, ())
    none = measure_trial(
        Trial(measure=MEASURE, setup=setup_of("rank", tiny_bert_folder, noise_file), arm=arm, seed=0),
        tmp_path / "two",
        lambda event: None,
    )
    assert none.texts["forgetting"] and not any(name.startswith("general") for name in none.numbers)
    assert forgetting_of([none]) == Message("forgetting.none", reason=none.texts["forgetting"])
    assert forgetting_of([none, record]) == forgetting_of([record])
    assert none.numbers["score"] == record.numbers["score"]  # off the path of training


def test_a_mean_needs_both_numbers() -> None:
    def record(**numbers: float) -> Record:
        named = {f"general_{name}": value for name, value in numbers.items()}
        return Record(arm=Arm(name="a"), seed=0, numbers=named, texts={"general_kind": "loss", "general": "g"})

    said = forgetting_of([record(before=1.0, after=3.0), record(before=2.0, after=6.0), record(before=9.0)])
    assert said == Message("forgetting.loss", before=1.5, after=4.5, general="g")
    assert forgetting_of([]) is None


def test_the_table_of_scores_has_the_column_where_it_was_measured() -> None:
    plain = planted("r=8", [1.0, 0.0])
    told = [replace(run, numbers={**run.numbers, "general_before": 1.0, "general_after": 2.0}) for run in plain]
    told = [replace(run, texts={**run.texts, "general_kind": "loss", "general": "g"}) for run in told]
    for runs, has in ((plain, False), (told, True)):
        table = scores_table({"r=8": runs}, Metric(name="accuracy"))
        assert ("forgetting" in [column.name for column in table.columns]) is has


def test_another_general_text_is_another_cell(tmp_path: Path, general_file: Path) -> None:
    def digest(**changes: Any) -> str:
        own = setup("rank", StudyOptions(**changes))
        return Trial(measure=MEASURE, setup=own, arm=Arm(name="a"), seed=0).digest

    assert len({digest(), digest(general="a.txt"), digest(general="b.txt")}) == 3
    assert json.loads(json.dumps(setup("rank", StudyOptions(general="a.txt")).to_json()))["general"] == "a.txt"


def test_a_study_goes_on_with_the_general_text_that_it_was_begun_with(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, labelled_file: Path
) -> None:
    file = Path(shutil.copy(labelled_file, tmp_path / "general.csv"))
    own = setup_of("rank", tiny_bert_folder, noise_file, general=str(file))
    arms = [Arm(name=f"{n}", fields={"rank": n}) for n in (1, 2)]
    facts = prepare(own, arms)[2]
    assert facts["general"] == digest_of(find(str(noise_file)), "sequence-classification", str(file))
    store.keep_facts(tmp_path, "rank", facts)
    store.require_same_facts(tmp_path, "rank", prepare(own, arms)[2])
    file.write_text(file.read_text(encoding="utf-8").replace(" film", " fine"), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        store.require_same_facts(tmp_path, "rank", prepare(own, arms)[2])
    assert (error.value.code, error.value.field) == ("other_run", "general")
    file.unlink()
    with pytest.raises(InputError):
        prepare(own, arms)


@pytest.mark.slow
@pytest.mark.skipif(TASKS["nyt-editorials"].locate() is None, reason="the archive of rated texts is not here")
@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].locate is TASKS["tweets"].locate])
def test_every_packaged_task_of_texts_has_other_data_beside_it(name: str) -> None:
    task = find(name)
    cut = type(task)(**{**vars(task), "splits": {split: rows[:500] for split, rows in task.splits.items()}})
    for kind in ("causal-lm", "sequence-classification"):
        found = general_task(cut, kind)
        assert found.name != name and min(map(len, found.splits.values())) >= forgetting.TEXT_ROWS
