"""Choices of layers: budgets are equal, blanks follow from the numbers, updates are read."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of

from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError, LearningError, RunError
from loralab.models.load import Base
from loralab.studies.budgets import largest_rank, solved, trained_parameters
from loralab.studies.measures.updates import MEASURE_UPDATES, measure, sizes
from loralab.studies.places import choices, layout, outside, projections, source_reaches_mlp
from loralab.studies.prepare import prepare
from loralab.studies.questions import targets
from loralab.studies.study import FAILED, Arm, Record, StudySetup, Trial

SETUP = StudySetup(study="targets", model="m", data="d")
GOOD, FAIR, POOR = [1] * 90 + [0] * 10, [1] * 87 + [0] * 13, [1, 0] * 50


def base(model: object) -> Base:
    return Base(name="tiny", model=model, tokenizer=None, kind="causal-lm", source="")


def arm(name: str, scores: list[int], parameters: int, step: float = 0.1) -> list[Record]:
    """Plant records of an arm that trains so many parameters, 10 of them in the head."""
    rank = int(name.rpartition("=")[2]) if "=" in name else 0
    found = planted(name, scores, rank=rank)
    numbers = {"parameters": parameters + 10, "head_parameters": 10, "step_seconds": step}
    return [Record(**{**vars(r), "numbers": {**r.numbers, **numbers}}) for r in found]


@pytest.mark.parametrize("make", tiny.MODELS.values(), ids=list(tiny.MODELS))
def test_ranks_are_solved_for_and_not_copied(make: tiny.Make) -> None:
    model = base(make())
    found = targets.arms(SETUP, model)
    sized = [a for a in found if a.name.rpartition(" r=")[0] in targets.CHOICES]
    counts = {a.name: trained_parameters(model, a.fields) for a in sized}
    reference = trained_parameters(model, {"method": "lora", "rank": 8})
    most = min(
        trained_parameters(model, {**a.fields, "rank": largest_rank(model, a.fields)})
        for a in sized
        if a.name.endswith(" r=8")
    )
    budget = min(reference, most)
    choices_at = {targets.choice_of(n) for n, c in counts.items() if abs(c / budget - 1) <= 0.1}
    assert choices_at == set(targets.CHOICES)
    assert {n for n in counts if n.endswith(" r=8")} == {f"{c} r=8" for c in targets.CHOICES}
    for each in sized:
        assert each.fields["rank"] <= largest_rank(model, each.fields) or each.name.endswith(" r=8")


def test_the_reference_arm_is_the_one_that_studies_share() -> None:
    found = {a.name: a for a in targets.arms(SETUP, base(tiny.llama()))}
    assert found["all-linear r=8"].fields == {"method": "lora", "rank": 8}
    assert found["all-linear r=8"].options == {}


def test_quick_is_few_arms() -> None:
    found = targets.arms(StudySetup(study="targets", model="m", data="d", quick=True), base(tiny.bert()))
    assert len([a for a in found if a.tuned and a.name != "all-linear r=8"]) <= 7
    assert not any(a.name.startswith(("q ", "k ", "o ")) for a in found)


def test_values_choose_and_wrong_ones_are_refused() -> None:
    model = base(tiny.llama())
    chosen = StudySetup(study="targets", model="m", data="d", values=("mlp",))
    assert {targets.choice_of(a.name) for a in targets.arms(chosen, model) if a.tuned} == {"mlp", "all-linear"}
    with pytest.raises(ConfigError, match="attention") as raised:
        targets.arms(StudySetup(study="targets", model="m", data="d", values=("atention",)), model)
    assert (raised.value.code, raised.value.field) == ("invalid_choice", "values")


def test_fused_projections_are_addressed_by_parts() -> None:
    model = tiny.gpt2()
    assert choices(model)["q+v"] == ("c_attn.q", "c_attn.v")
    assert projections(tiny.llama()) == ("q_proj", "k_proj", "v_proj")
    assert source_reaches_mlp(model)  # c_proj stands in attention and behind c_fc
    assert not source_reaches_mlp(tiny.llama())


def test_the_layout_divides_all_linear_layers() -> None:
    rows = layout(tiny.llama())
    assert sum(row["count"] for row in rows) == 3 * 7
    assert outside(rows) == []
    assert outside(layout(tiny.bert())) == ["bert.pooler.dense"]
    keys = next(row for row in rows if row["type"] == "self_attn.k_proj")
    assert (keys["outputs"], keys["inputs"], keys["place"]) == (16, 32, "attention")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"method": "lora"}, "rank"),
        ({"method": "lora", "target_modules": ["q_proj", "v_proj"]}, "rank"),
        ({"method": "houlsby"}, "width"),
        ({"method": "pfeiffer"}, "width"),
        ({"method": "prefix"}, "tokens"),
        ({"method": "dora"}, "rank"),
    ],
)
def test_no_other_size_comes_nearer_to_a_budget(fields: dict[str, object], size: str) -> None:
    model = base(tiny.llama())
    tried = [trained_parameters(model, {**fields, size: n}) for n in range(1, 60)]
    for budget in (1, 900, 4321):
        own = solved(model, fields, size, budget)
        assert abs(own.parameters - budget) == min(abs(n - budget) for n in tried)
        assert own.fields[size] == own.size


def test_counting_leaves_the_model_as_it_was() -> None:
    model = base(tiny.bert())
    before = {name: id(p) for name, p in model.model.named_parameters()}
    head = sum(p.numel() for p in model.model.classifier.parameters())
    own = Base(**{**vars(model), "kind": "sequence-classification"})
    assert trained_parameters(own, {"method": "linear-probe"}) == 0
    assert trained_parameters(own, {"method": "full"}) == sum(p.numel() for p in model.model.parameters()) - head
    assert {name: id(p) for name, p in model.model.named_parameters()} == before


def test_a_size_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        solved(base(tiny.llama()), {"method": "lora"}, "alpha", 100)
    assert (raised.value.code, raised.value.field) == ("invalid_choice", "size")


def test_updates_are_measured_against_their_weights() -> None:
    adapter = tiny.fill(attach(tiny.llama(), LoRA(rank=2)))
    rows = {row["type"]: row for row in sizes(adapter)}
    own = [m for n, m in adapter.modules.items() if n.endswith("k_proj") and isinstance(m, LinearWithLoRA)]
    expected = [float((m.scaling * m.lora_B @ m.lora_A).detach().norm() / m.base.weight.norm()) for m in own]
    assert rows["self_attn.k_proj"]["ratio"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_a_planted_order_fills_the_blanks() -> None:
    records = [
        *arm("base", POOR, 0),
        *arm("q+v r=8", FAIR, 100, 0.2),
        *arm("attention r=8", GOOD, 200, 0.1),
        *arm("mlp r=8", POOR, 300),
        *arm("all-linear r=8", GOOD, 400, 0.3),
        *arm("q+v r=32", GOOD, 400, 0.2),
        *arm("attention r=16", GOOD, 400, 0.2),
        *arm("mlp r=11", POOR, 410, 0.01),
    ]
    answer = targets.conclude(records, SETUP)
    assert keys_in([label for label, _ in answer.blanks]) == ["targets.smallest", "targets.value", "targets.ceiling"]
    smallest, value, _ = (message_in(text, "targets.described").values for _, text in answer.blanks)
    assert (smallest["arm"], smallest["adapter_parameters"]) == ("q+v r=8", 100)
    found = answer.ranking
    assert value["arm"] == found.recommended
    families = [m.values["ranking"] for m in answer.sentence.values["parts"][:2]]
    assert message_in(answer.sentence, "ranking.at_budget").values["parameters"] == 400
    assert message_in(answer.sentence, "targets.at_rank").values["rank"] == 8
    assert [message.key for message in families] == ["ranking.leader"] * 2
    sizes = answer.tables[0].rows
    assert [row["off_budget"] for row in sizes if row["rank"] != 8] == pytest.approx([0, 0, 0.025])
    assert [row["off_budget"] for row in sizes if row["rank"] == 8] == [None, None, None, 0]
    assert_it_renders(answer, "targets")
    assert found.contrast("all-linear r=8", "mlp r=11").verdict == "better"
    assert answer.advice["rank"] == 8
    assert any(f.holds and f.sentence.values["b"] == "mlp r=11" for f in answer.findings)
    assert len({f.sentence for f in answer.findings}) == len(answer.findings)


def falling(records: list[Record]) -> list[Record]:
    """Return records whose scores are losses: what was right more often loses more."""
    return [
        replace(
            r,
            texts={"metric": "loss"},
            numbers={**r.numbers, "score": 1 + r.numbers["score"]},
            items={"score": [-1 - value for value in r.items["score"]]},
        )
        for r in records
    ]


def test_of_losses_the_smallest_leads() -> None:
    records = [*arm("base", GOOD, 0), *arm("q+v r=8", POOR, 100), *arm("all-linear r=8", FAIR, 400)]
    answer = targets.conclude(falling(records), SETUP)
    assert message_in(answer.sentence, "targets.at_rank").values["ranking"].values["arm"] == "q+v r=8"
    assert answer.ranking.recommended == "q+v r=8"
    assert message_in(answer.blanks[2][1], "score.loss_interval").values["value"] == pytest.approx(1.5, abs=0.01)
    assert_it_renders(answer, "targets")


def test_on_noise_nothing_is_claimed() -> None:
    records = [*arm("q+v r=8", GOOD, 100), *arm("all-linear r=8", GOOD, 400), *arm("base", GOOD, 0)]
    answer = targets.conclude(records, SETUP)
    assert not any(f.holds for f in answer.findings)
    assert answer.advice == {}
    assert answer.ranking.recommended is None


def test_an_arm_that_failed_moves_no_other_into_its_family() -> None:
    failed = Record(arm=Arm(name="mlp r=11"), seed=0, status=FAILED, reason="lost")
    records = [
        *arm("mlp r=8", GOOD, 300),
        *arm("all-linear r=8", GOOD, 400),
        *arm("q+v r=32", POOR, 400),
        *arm("q+v r=8", POOR, 100),
        failed,
    ]
    by_rank, by_size = targets.families(records, {r.arm.name: [r] for r in records if r.items})
    assert set(by_size) == {"all-linear r=8", "q+v r=32"}
    assert set(by_rank) == {"mlp r=8", "all-linear r=8", "q+v r=8"}
    assert "targets.at_rank" in keys_in(targets.conclude(records, SETUP).sentence)


def test_nothing_measured_is_said_in_every_blank() -> None:
    answer = targets.conclude([], SETUP)
    assert answer.sentence.key == "answer.nothing"
    assert [text.key for _, text in answer.blanks] == ["answer.nothing"] * 3


def test_one_arm_of_one_seed_is_enough_for_an_answer() -> None:
    answer = targets.conclude(planted("q+v r=8", [1, 0, 1, 1], seeds=1, rank=8), SETUP)
    assert answer.blanks[0][1].values["arm"] == "q+v r=8"


def test_the_whole_study_reads_the_updates_of_its_own_reference(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    setup = setup_of("targets", tiny_bert_folder, noise_file, values=("q+v",), seeds=1)
    records = here(setup, tmp_path)
    told = next(r for r in records if r.arm.name == targets.UPDATES)
    assert told.reason == ""
    assert {row["type"] for row in told.tables["updates"]} >= {"attention.self.query", "output.dense"}
    assert all(row["ratio"] > 0 for row in told.tables["updates"])
    answer = targets.conclude(records, setup)
    assert [f.name for f in answer.figures] == ["targets", "importance"]
    assert message_in(answer.method, "targets.none_is_more").values["layers"] == ["bert.pooler.dense"]
    assert sum(row["count"] for row in answer.tables[0].rows) == sum(row["count"] for row in told.tables["layers"])
    assert_it_renders(answer, "targets")


def test_updates_say_that_the_reference_is_missing(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    trial = Trial(
        measure=MEASURE_UPDATES,
        setup=setup_of("targets", tiny_bert_folder, noise_file),
        arm=Arm(name="updates"),
        seed=0,
    )
    with pytest.raises(RunError) as raised:
        measure(trial, tmp_path / "runs" / "x", lambda event: None)
    assert raised.value.code == "no_reference"
    assert not isinstance(raised.value, LearningError)  # nothing has diverged


def test_every_arm_can_run_on_the_models_at_hand(tiny_llama_folder: Path, sums_file: Path) -> None:
    setup = setup_of("targets", tiny_llama_folder, sums_file)
    arms, invalid, _ = prepare(setup, None)
    assert invalid == {}
    assert {a.name.rpartition(" r=")[0] for a in arms if a.tuned} >= set(targets.CHOICES)
