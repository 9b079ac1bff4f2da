"""card(): what a hub reads of an artefact, and what it never says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import loralab
from loralab.artefacts.artefact import model_id
from loralab.artefacts.card_text import escaped
from loralab.errors import AdapterFileError, ConfigError, OutputError


@pytest.fixture(scope="module")
def made(flat_llama_folder: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all tests."""
    training = loralab.Training(max_steps=2, batch_size=4, precision="fp32")
    output = tmp_path_factory.mktemp("carded") / "sums"
    method = loralab.LoRA(rank=3)
    loralab.train(
        model=str(flat_llama_folder), data=str(sums_file), output_dir=output, method=method, training=training
    )
    return output


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(made, tmp_path / "sums")


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])  # type: ignore[no-any-return]


def with_record(folder: Path, **sections: dict[str, Any]) -> None:
    """Change sections of a record."""
    record = json.loads((folder / "loralab.json").read_text(encoding="utf-8"))
    for name, fields in sections.items():
        record[name] = {**record.get(name, {}), **fields}
    (folder / "loralab.json").write_text(json.dumps(record), encoding="utf-8")


def test_a_hub_reads_its_front_matter(trained: Path) -> None:
    made = loralab.card(trained, base_model="org/base", license="mit", dataset="org/rows", repo="me/my-sums")
    read = ModelCard.load(trained / "README.md")
    record = json.loads((trained / "loralab.json").read_text(encoding="utf-8"))
    data = read.data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["license"], data["datasets"]) == ("peft", "mit", ["org/rows"])
    assert data["pipeline_tag"] == "text-generation" and data["tags"] == ["loralab", "lora"]
    values = {result.metric_name: result.metric_value for result in read.data.eval_results}
    assert values == record["metrics"]["validation"]
    assert {result.dataset_split for result in read.data.eval_results} == {"validation"}
    assert read.data.model_name == "my-sums" and front_matter(made.text)["model-index"][0]["name"] == "my-sums"


def test_what_is_not_known_is_left_out_and_no_place_is_told(trained: Path, flat_llama_folder: Path) -> None:
    made = loralab.card(trained)
    assert {"base_model", "license", "datasets", "base_model_relation"} & set(front_matter(made.text)) == set()
    for place in (str(trained.parent), str(flat_llama_folder.parent)):
        assert place not in made.text


def test_it_tells_how_to_load_it_in_four_libraries(trained: Path) -> None:
    text = loralab.card(trained, base_model="org/base", repo="me/sums").text
    for line in (
        'model = PeftModel.from_pretrained(base, "me/sums")',
        "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules sums=me/sums",
        "loralab export sums adapter-for-llama --to gguf",
        "hf download me/sums --local-dir sums",
        "loralab verify sums",
    ):
        assert line in text.splitlines(), line


def test_a_classifier_has_lines_of_engines_that_run_it(trained: Path) -> None:
    with_record(trained, base={"kind": "sequence-classification"}, task={"labels": ["a", "b", "c"]})
    made = loralab.card(trained, base_model="org/base", repo="me/sums")
    assert made.metadata["pipeline_tag"] == "text-classification"
    assert 'from_pretrained("org/base", num_labels=3,' in made.text and "loralab evaluate --adapter sums" in made.text
    assert not [line for line in made.text.splitlines() if line.startswith(("llama-cli", "vllm", "loralab generate"))]


def test_a_method_that_peft_does_not_have_says_so(tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    training = loralab.Training(max_steps=2, batch_size=4, precision="fp32")
    data = {"model": str(tiny_llama_folder), "data": str(sums_file), "output_dir": tmp_path / "b"}
    loralab.train(**data, method=loralab.Bottleneck(), training=training)
    made = loralab.card(tmp_path / "b")
    assert made.metadata["library_name"] == "loralab" and "PeftModel" not in made.text


def test_a_readme_of_somebody_stays(trained: Path) -> None:
    first = loralab.card(trained).text
    assert loralab.card(trained).text == first  # ours, untouched
    file = trained / "README.md"
    file.write_text(first.replace("## Data", "## My data"), encoding="utf-8")
    with pytest.raises(OutputError) as error:
        loralab.card(trained)
    assert error.value.code == "output_exists" and "## My data" in file.read_text(encoding="utf-8")
    assert loralab.card(trained, overwrite=True).text == first
    file.unlink()
    file.mkdir()
    with pytest.raises(OutputError):
        loralab.card(trained)


def test_a_card_changes_nothing_that_was_certified(trained: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    loralab.merge(trained, merged)
    made = loralab.card(merged)
    assert made.metadata["library_name"] == "transformers" and "PeftModel" not in made.text
    loralab.card(trained)
    (merged / ".gitattributes").touch()
    assert loralab.verify(merged).passed and loralab.verify(trained).passed


@pytest.mark.parametrize("text", ["a|b\n# c", "<script>x</script>", "[x](http://y)", "`x` *y* _z_", "$a$ ~b~ !c"])
def test_texts_of_a_folder_are_no_markup(trained: Path, text: str) -> None:
    with_record(trained, task={"name": text, "instruction": text, "labels": [text, "b"]})
    made = loralab.card(trained)
    assert text not in made.text.split("---\n", 2)[2]
    assert "\n" not in escaped(text) and escaped(text) in made.text
    rows = [line for line in made.text.splitlines() if line.startswith("| question |")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3
    assert front_matter(made.text)["model-index"][0]["results"]


def test_data_has_a_name_that_a_hub_takes(trained: Path) -> None:
    with_record(trained, task={"name": "/data/影評 2.csv"})
    (result,) = front_matter(loralab.card(trained).text)["model-index"][0]["results"]
    assert result["dataset"] == {"type": "-2.csv", "name": "影評 2.csv", "split": "validation"}


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("dinov2-s", None),
        ("org/base", "org/base"),
        ("/home/x/.cache/hub/models--org--base.v1/snapshots/abc", "org/base.v1"),
        ("/home/x/base", None),
        ("", None),
        (None, None),
    ],
)
def test_a_base_has_the_id_that_its_name_stands_for(name: str | None, hub: str | None) -> None:
    assert model_id(name) == hub


def test_what_is_no_artefact_and_no_id_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as error:
        loralab.card(tmp_path)
    assert error.value.code == "no_record"
    for field in ("base_model", "dataset", "repo"):
        with pytest.raises(ConfigError) as wrong:
            loralab.card(trained, **{field: "/etc/passwd"})
        assert (wrong.value.code, wrong.value.field) == ("not_an_id", field)


def test_a_folder_of_peft_has_a_card_too(trained: Path) -> None:
    (trained / "loralab.json").unlink()
    made = loralab.card(trained)
    assert made.metadata["library_name"] == "peft" and not {"model-index", "model_name"} & set(made.metadata)
