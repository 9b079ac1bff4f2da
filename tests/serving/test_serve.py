"""serve(): wrong input ends before anything listens; what is served is told once it is."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving.without_model import open_engine

from loralab.errors import ConfigError
from loralab.serving.serve import serve


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the arguments of engines that were opened without a model."""
    found: list[dict[str, Any]] = []

    def opening(**asked: Any) -> Any:
        found.append(asked)
        return open_engine(**asked)

    monkeypatch.setitem(sys.modules, "loralab.serving.opening", SimpleNamespace(open_engine=opening))
    return found


def test_it_serves_until_a_signal(opened: list[dict[str, Any]], tiny_llama_folder: Path, tmp_path: Path) -> None:
    told: list[Any] = []

    def ready(found: Any, where: str, with_keys: bool) -> None:
        told.append((list(found.adapters), where, with_keys))
        signal.raise_signal(signal.SIGTERM)

    serve(model=str(tiny_llama_folder), store=tmp_path, adapters={"sst": "a"}, pinned=["sst"], port=0, ready=ready)
    ((adapters, where, with_keys),) = told
    assert (adapters, with_keys) == (["sst"], False)
    assert opened[0]["store"] == tmp_path.resolve()
    with pytest.raises(httpx.ConnectError):
        httpx.get(where)


@pytest.mark.parametrize(
    "wanted",
    [
        {"host": "0.0.0.0"},
        {"keys": Path("keys.toml"), "no_keys": True},
        {"allow_origins": ["*"]},
        {"allow_hosts": ["not a name"]},
    ],
    ids=str,
)
def test_nothing_is_opened_for_wrong_rules(
    opened: list[dict[str, Any]], tmp_path: Path, wanted: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        serve(model="m", store=tmp_path, port=0, **wanted)
    assert opened == []
