"""LoRA on a Vision Transformer: against probe and full, and what the model is made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, messages_in, planted, setup_of
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from loralab.adapters.methods import FullFineTune
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.measures.anatomy import facts, likeness
from loralab.studies.places import layout, projections
from loralab.studies.questions import vision
from loralab.studies.study import Arm, Record, StudySetup
from loralab.training.optim import usual_rate

SETUP = StudySetup(study="vision", model="m", data="d", fields={"max_steps": 24})
GOOD, MIDDLE, POOR = [1] * 90 + [0] * 10, [1] * 75 + [0] * 25, [1, 0] * 50
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny DINOv2 without a head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eyes")
    Dinov2Model(Dinov2Config(**CONFIG)).save_pretrained(folder)
    return folder


def model() -> Dinov2ForImageClassification:
    torch.manual_seed(0)
    return Dinov2ForImageClassification(Dinov2Config(**CONFIG, num_labels=3)).eval()


def seen() -> Base:
    return Base(name="tiny", model=model(), tokenizer=None, kind="image-classification", source="")


def arm(name: str, scores: list[int], parameters: int = 100) -> list[Record]:
    fields = {"method": "lora", "rank": 8} if "r=8" in name else {"method": name}
    if name == "q+v r=8":
        fields["target_modules"] = ["q_proj", "v_proj"]
    numbers = {"parameters": parameters + 10, "head_parameters": 10}
    return [
        Record(**{**vars(r), "arm": Arm(name=name, fields=fields), "numbers": {**r.numbers, **numbers}})
        for r in planted(name, scores)
    ]


def test_arms_are_probe_choices_and_full() -> None:
    names = [a.name for a in vision.arms(SETUP, seen()) if a.tuned]
    every = ["q+v r=8", "attention r=8", "mlp r=8", "all-linear r=8"]
    assert names == ["linear-probe", *every, "full"]
    quick = StudySetup(study="vision", model="m", data="d", quick=True)
    found = {a.name: a for a in vision.arms(quick, seen())}
    assert [n for n, a in found.items() if a.tuned] == ["linear-probe", "q+v r=8", "all-linear r=8", "full"]
    assert found["all-linear r=8"].fields == {"method": "lora", "rank": 8}
    assert projections(model()) is not None


def test_text_models_and_unknown_choices_are_refused() -> None:
    text = Base(name="t", model=tiny.bert(), tokenizer=None, kind="sequence-classification", source="")
    with pytest.raises(ConfigError) as raised:
        vision.arms(SETUP, text)
    assert (raised.value.code, raised.value.field) == ("no_pictures", "model")
    wrong = StudySetup(study="vision", model="m", data="d", values=("q,v",))
    with pytest.raises(ConfigError, match=r"q\+v") as raised:
        vision.arms(wrong, seen())
    assert (raised.value.code, raised.value.field) == ("invalid_choice", "values")


def test_the_model_is_counted() -> None:
    rows, own = layout(model()), facts(model(), 28)
    assert sum(row["count"] for row in rows) == 2 * 6
    assert {row["place"] for row in rows} == {"attention", "mlp"}
    assert (own["patches"], own["convolutions"]) == (4, 1)
    assert own["convolution_parameters"] == 32 * 3 * 14 * 14 + 32
    text = likeness({"vision": rows, "facts": [own], "language": layout(tiny.llama())})
    counts = [m.values["count"] for m in messages_in(text) if m.key == "vision.linear_layers"]
    assert counts == [12, 21]
    assert message_in(text, "vision.different").values == {"side": 28, "patches": 4, "patch": 14}
    assert message_in(text, "vision.convolutions").values["count"] == 1


def test_a_planted_order_is_claimed() -> None:
    records = [
        *arm("linear-probe", POOR, 0),
        *arm("q+v r=8", GOOD, 100),
        *arm("all-linear r=8", GOOD, 400),
        *arm("full", MIDDLE, 9000),
    ]
    answer = vision.conclude(records, SETUP)
    found = answer.ranking
    assert [found.contrast("q+v r=8", other).verdict for other in ("linear-probe", "full")] == ["better"] * 2
    assert found.contrast("q+v r=8", "all-linear r=8").verdict == "equivalent"
    assert (found.recommended, found.decided) == ("q+v r=8", True)  # no worse, and smaller
    assert answer.advice == {"target_modules": ["q_proj", "v_proj"], "rank": 8}
    labels = ["architecture", "layers", "performance", "plan"]
    assert [label.key for label, _ in answer.blanks] == [f"vision.ask_{name}" for name in labels]
    versus = message_in(answer.sentence, "vision.against").values
    assert versus["arm"] == "q+v r=8"
    assert [(m.key, m.values["rival"]) for m in versus["parts"]] == [
        ("vision.versus_better", "linear-probe"),
        ("vision.versus_better", "full"),
    ]
    arms = [m.values["arm"] for m in messages_in(answer.blanks[2][1]) if m.key == "vision.performance"]
    assert arms == ["linear-probe", "q+v r=8", "all-linear r=8", "full"]
    steps = [m.values for m in messages_in(answer.blanks[3][1]) if m.key == "join.numbered"]
    assert [step["number"] for step in steps] == list(range(1, len(steps) + 1))
    assert message_in(answer.blanks[3][1], "vision.longer").values["steps"] == 100
    assert answer.next.key == "vision.other_ranks"
    assert_it_renders(answer, "vision")
    assert any(f.holds for f in answer.findings)


def test_on_noise_lora_does_not_beat_the_probe() -> None:
    answer = vision.conclude([*arm("linear-probe", GOOD), *arm("q+v r=8", GOOD)], SETUP)
    assert answer.ranking.contrast("q+v r=8", "linear-probe").verdict != "better"
    assert message_in(answer.sentence, "vision.versus_missing").values["rival"] == "full"
    assert "vision.not_above_probe" in keys_in(answer.sentence)
    assert answer.next.key == "vision.more_pictures"
    assert answer.advice == {}
    assert not any(f.holds for f in answer.findings)


def test_nothing_measured_is_said() -> None:
    answer = vision.conclude([], SETUP)
    assert [text.key for _, text in answer.blanks] == ["vision.not_examined", *["answer.nothing"] * 3]
    assert answer.sentence.key == "answer.nothing"
    probe = vision.conclude(arm("linear-probe", GOOD), SETUP)
    assert probe.sentence.key == "answer.nothing"


def test_the_whole_study_on_pictures(
    here: Here, eyes: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralab.studies.measures import anatomy

    monkeypatch.setattr(anatomy, "skeleton", lambda name: tiny.llama())
    setup = setup_of("vision", eyes, pictures, seeds=1, quick=True, fields={"image_size": 28})
    records = here(setup, tmp_path)
    assert {r.arm.name: r.reason for r in records if r.reason} == {}
    answer = vision.conclude(records, setup)
    assert message_in(answer.blanks[0][1], "vision.linear_layers").values["count"] == 12
    assert "vision.full_rate" not in keys_in(answer.method)  # one rate for all
    tuned = vision.conclude(records, replace(setup, fixed_lr=False)).method
    assert message_in(tuned, "vision.full_rate").values["rate"] == usual_rate(FullFineTune())
    assert_it_renders(answer, "vision")
    assert len(answer.tables) == 2
    assert answer.figures
