"""What leaves the house: metadata, the source archive, and the files that tools look for."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import loralab

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]  # type: ignore[no-any-return]


def test_the_metadata_is_what_an_index_shows(project: dict[str, Any]) -> None:
    assert project["requires-python"] == ">=3.11" and project["license"] == "Apache-2.0"
    assert not [name for name in project["classifiers"] if name.startswith("License")]  # the expression says it
    for file in (project["readme"], *project["license-files"]):
        assert (ROOT / file).is_file()


def test_all_extras_of_one_environment_are_in_all(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    (named,) = re.findall(r"loralab\[(.+)\]", extras["all"][0])
    assert set(named.split(",")) == set(extras) - {"all", "dev", "docs", "ray", "attack"}
    documented = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [name for name in extras if name != "attack" and f"`{name}`" not in documented] == []


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == loralab.__version__ and cited["license"] == "Apache-2.0"


def test_the_source_archive_names_files_that_exist() -> None:
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *names = line.split()
        if command in ("include", "graft"):
            assert [name for name in names if not (ROOT / name).exists()] == []


def test_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"system"}


def test_agents_are_told_of_targets_and_folders_that_exist() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"make ([a-z-]+)", text)) <= set(targets)
    places = re.findall(r"`(?:src/loralab/)?([a-z]+)`", text[text.index("Where things are") : text.index("Rules")])
    assert [name for name in places if not (ROOT / "src/loralab" / name).is_dir()] == []
    assert len(text.splitlines()) < 60
