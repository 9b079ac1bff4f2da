"""Methods are found by name, class and file; what another package gets wrong is named."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from outside import LinearWithOuter, Outer, outer, registered, vera_plugin
from tiny import llama

import loralab
from loralab import LoRA, Method, Prefix, attach, register
from loralab.adapters import registry
from loralab.adapters.registry import (
    built_in,
    environment,
    is_outside,
    method_named,
    names,
    spec_of,
    spec_of_file,
    specs,
)
from loralab.errors import AdapterFileError, ConfigError, PluginWarning

Site = Callable[[str, str, str], Path]


@pytest.fixture(autouse=True)
def only_here() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Install a package with one module and an entry point, without an installer."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(module: str, content: str, value: str) -> Path:
        (tmp_path / f"{module}.py").write_text(content)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[loralab.methods]\n{module} = {value}\n")
        registry._LOADED.discard("plugins")
        return tmp_path

    return install


PLUGIN = """
from dataclasses import dataclass
from loralab import Method, MethodSpec, register

@dataclass(frozen=True, kw_only=True)
class Own(Method):
    size: int = 3

SPEC = MethodSpec(config=Own, name="own-one", build=print, fields=lambda c: {}, parse=Own)
"""


def test_a_method_is_found_by_name_by_class_and_by_file() -> None:
    register(outer(variants={"half": {"factor": 0.5}}))
    spec, options = method_named("HALF")
    assert (spec.name, options) == ("outer", {"factor": 0.5})
    assert spec_of(Outer()) is spec_of_file("OUTER") is spec
    assert {"outer", "half", "lora", "dora"} <= set(names())
    assert is_outside(spec)
    assert "outer" not in built_in()


def test_the_public_names_are_these() -> None:
    assert loralab.Method is Method
    assert loralab.register is register
    assert issubclass(LoRA, loralab.Method)
    assert loralab.MethodSpec(config=Outer, name="outer").learning_rate == 1e-3


@pytest.mark.parametrize(
    "again",
    [
        outer(),
        outer(config=type("Other", (Outer,), {})),
        outer(name="other"),
        outer(name="dora"),
        outer(name="lora"),
        outer(name="other", variants={"lora": {}}),
        outer(name="other", peft_type="LORA"),
    ],
)
def test_what_is_taken_is_refused(again: Any) -> None:
    register(outer())
    if again.config is not Outer:
        again = outer(config=dataclass(frozen=True, kw_only=True)(again.config))
    with pytest.raises(ConfigError) as caught:
        register(again)
    assert (caught.value.code, caught.value.field) == ("method_taken", again.name)
    assert spec_of(Outer()).name == "outer"


@dataclass
class Thawed:
    rank: int = 4


class Undecorated(Method):
    rank: int = 4


@dataclass(frozen=True)
class Unrelated:
    rank: int = 4


@dataclass(frozen=True, kw_only=True)
class Clashing(Method):
    model: str = ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config": Thawed}, "not_frozen"),
        ({"config": Undecorated}, "not_frozen"),
        ({"config": object}, "not_frozen"),
        ({"config": Outer()}, "not_frozen"),
        ({"config": Unrelated}, "no_targets"),
        ({"config": Clashing}, "reserved_field"),
        ({"build": None}, "no_function"),
        ({"fields": None}, "no_function"),
        ({"parse": "text"}, "no_function"),
        ({"learning_rate": 0}, "bad_rate"),
        ({"learning_rate": "fast"}, "bad_rate"),
        ({"name": "Two Words"}, "bad_name"),
        ({"name": ""}, "bad_name"),
        ({"name": 5}, "bad_name"),
    ],
)
def test_a_method_that_could_only_fail_later_is_refused(changes: dict[str, Any], code: str) -> None:
    spec = outer(**changes)
    with pytest.raises(ConfigError) as caught:
        register(spec)
    assert (caught.value.code, caught.value.field) == (code, str(spec.name))


def test_a_configuration_that_nobody_registered_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        attach(llama(), Outer())
    assert caught.value.code == "unknown_method"
    with pytest.raises(ConfigError) as caught:
        method_named("outer")
    assert caught.value.code == "unknown_method"
    with pytest.raises(AdapterFileError) as refused:
        spec_of_file("OUTER")
    assert (refused.value.code, refused.value.field) == ("unknown_method", "peft_type")


def test_the_peft_type_is_what_the_fields_say() -> None:
    register(outer(fields=lambda config: {"peft_type": "OWN_KIND"}))
    assert spec_of_file("OWN_KIND").name == "outer"


@pytest.mark.parametrize(
    ("value", "more"),
    [
        ("{m}:SPEC", ""),
        ("{m}:offer", "def offer():\n    return SPEC"),
        ("{m}", ""),
        ("{m}", "register(SPEC)"),
        ("{m}:offer", "def offer():\n    register(SPEC)"),
    ],
)
def test_an_entry_point_is_loaded_when_a_method_is_asked_for(site: Site, value: str, more: str) -> None:
    module = f"plugin_{len(value)}_{len(more)}"
    content = PLUGIN + more
    site(module, content, value.format(m=module))
    assert method_named("lora")[0].config is LoRA
    assert module not in sys.modules
    assert method_named("own-one")[0].config.__name__ == "Own"
    assert environment()["LORALAB_METHODS"] == module


@pytest.mark.parametrize(
    "content",
    [
        "raise RuntimeError('broken')",
        "import not_there",
        "def broken(:",
        "raise SystemExit(3)",
        "from outside import outer\nfrom loralab import register\nregister(outer(name='lora'))",
    ],
)
def test_a_plugin_that_fails_is_named_once_and_the_rest_works(site: Site, content: str) -> None:
    module = f"failing_{abs(hash(content))}"
    site(module, content, module)
    site(f"{module}_good", PLUGIN, f"{module}_good:SPEC")
    with pytest.warns(PluginWarning, match=module) as caught:
        assert "own-one" in specs()
    assert len(caught) == 1
    assert {"own-one", "lora"} <= set(specs())
    assert spec_of(Prefix()).name == "prefix"


def test_a_process_of_ours_knows_what_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment() == {}
    vera = vera_plugin()
    register(vera.SPEC)
    told = environment()
    assert told["LORALAB_METHODS"] == "vera_plugin"
    registry._SPECS.pop("vera")
    registry._LOADED.discard("plugins")
    monkeypatch.setenv("LORALAB_METHODS", told["LORALAB_METHODS"])
    assert "vera" in specs()


def test_what_is_attached_is_the_layer_of_the_package() -> None:
    register(outer())
    adapter = attach(llama(), Outer(target_modules=["q_proj"]))
    kinds = [m for m in adapter.model.modules() if isinstance(m, LinearWithOuter)]
    assert len(kinds) == len(adapter.modules) == 3
