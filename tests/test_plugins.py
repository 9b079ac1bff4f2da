"""Names of other packages: found on first need; one that fails is named and the rest works."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from loralab.errors import ConfigError, PluginWarning
from loralab.models.catalog import MODELS, NamedModel
from loralab.plugins import Registry
from loralab.tasks.catalog import TASKS, NamedTask

Site = Callable[..., None]
GROUP = "loralab.tried"


@dataclass(frozen=True)
class Thing:
    name: str
    size: int = 0


def registry(*own: str) -> Registry[Thing]:
    return Registry(Thing, GROUP, own)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Install a package with one module and an entry point, without an installer."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(module: str, content: str, value: str = "", group: str = GROUP) -> None:
        (tmp_path / f"{module}.py").write_text(content)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {value or module}\n")

    return install


@pytest.mark.parametrize(
    ("attribute", "more"),
    [
        ("", "ONE = Thing('one')"),
        ("ONE", "ONE = Thing('one')"),
        ("ALL", "ALL = [Thing('one'), Thing('two')]"),
        ("offer", "def offer():\n    return Thing('one'), Thing('two')"),
    ],
)
def test_an_entry_point_is_imported_when_a_name_is_asked_for(site: Site, attribute: str, more: str) -> None:
    module = f"tried_{len(attribute)}_{len(more)}"
    content = f"import sys\nThing = sys.modules[{__name__!r}].Thing\n{more}"
    sys.modules.setdefault(__name__, sys.modules[Thing.__module__])
    site(module, content, f"{module}:{attribute}" if attribute else module)
    found = registry()
    assert module not in sys.modules
    assert "one" in found and found["one"].size == 0
    assert ("two" in found) == ("two" in more)


@pytest.mark.parametrize(
    "content", ["raise RuntimeError('broken')", "import not_there", "def broken(:", "raise SystemExit(3)"]
)
def test_a_plugin_that_fails_is_named_once_and_the_rest_works(site: Site, content: str) -> None:
    module = f"failing_names_{abs(hash(content))}"
    site(module, content)
    found = registry()
    found.register(Thing("own"))
    with pytest.warns(PluginWarning, match=module) as caught:
        assert list(found) == ["own"]
    assert len(caught) == 1
    assert len(found) == 1


def test_a_name_that_is_taken_is_refused_and_the_first_one_stays() -> None:
    found = registry()
    first = Thing("own", 1)
    found.register(first)
    found.register(first)  # as a module does that registers what its package offers as well
    with pytest.raises(ConfigError) as error:
        found.register(Thing("own", 2))
    assert (error.value.code, error.value.field) == ("name_taken", "own")
    assert found["own"] is first


@pytest.mark.parametrize(
    ("entry", "code"),
    [(Thing(""), "bad_name"), (Thing("a/b"), "bad_name"), (Thing("Ab"), "bad_name"), ("text", "wrong_type")],
)
def test_what_cannot_be_named_is_refused(entry: Thing, code: str) -> None:
    with pytest.raises(ConfigError) as error:
        registry().register(entry)
    assert error.value.code == code


def test_a_name_of_ours_cannot_be_taken() -> None:
    for names in (MODELS, TASKS):
        taken = next(iter(names.values()))
        with pytest.raises(ConfigError) as error:
            names.register(type(taken)(**{**vars(taken), "licence": "another"}))  # type: ignore[arg-type]
        assert error.value.code == "name_taken"


def test_threads_that_ask_at_once_all_see_every_name(site: Site) -> None:
    site("slow_names", f"import sys, time\ntime.sleep(0.2)\nA = sys.modules[{Thing.__module__!r}].Thing('a')")
    found, seen = registry(), []
    threads = [threading.Thread(target=lambda: seen.append(list(found))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["a"]] * 4


@pytest.mark.parametrize("names", [MODELS, TASKS], ids=["models", "tasks"])
def test_a_package_of_ones_own_brings_a_short_name(site: Site, names: Registry[NamedModel | NamedTask]) -> None:
    part = names.group.removeprefix("loralab.")
    rest = "kind='encoder', parameters=1, get='ask'" if part == "models" else "rows=1, get=lambda: 'ask', load=print"
    site(
        f"own_{part}",
        f"from loralab.{part}.catalog import {names.kind.__name__} as Kind, register\n"
        f"Kind\nOWN = Kind(name='own-name', licence='', description='', locate=lambda: None, {rest})\n",
        group=names.group,
    )
    fresh = Registry(names.kind, names.group, ())
    assert [entry.name for entry in fresh.values()] == ["own-name"]
