"""serve(): an engine behind HTTP, until a signal ends it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError
from loralab.serving.http.app import build_app
from loralab.serving.http.gate import hosts_of
from loralab.serving.http.keys import Keys, read
from loralab.serving.http.origins import origins_of
from loralab.serving.http.server import Listener, address, is_loopback, open_socket
from loralab.serving.http.service import ServerInfo, server_info
from loralab.serving.settings import Limits, ServeSettings

OnReady = Callable[[ServerInfo, str, bool], None]


def serve(
    *,
    model: str,
    store: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    pinned: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    no_keys: bool = False,
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
    settings: ServeSettings | None = None,
    limits: Limits | None = None,
    ready: OnReady | None = None,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API; blocks until a signal ends it.

    Args:
        model: short name, folder, GGUF file or hub id of the base.
        store: a folder of adapter folders.
        adapters: further names for folders inside the store.
        pinned: names that always stay in memory.
        host, port: the address to listen on; port 0 is any that is free.
        keys: a TOML file of keys; without one, only programs on this machine are listened to,
            unless `no_keys` lets everyone ask and load adapters.
        allow_hosts: further names of this server, as clients write them.
        allow_origins: sites whose pages may ask this server.
        ready: called once it listens, with what is served, the address, and if keys are needed.

    Raises:
        InputError: the base, the store, an adapter or an option is wrong.
    """
    known = keys_for(host, keys, no_keys=no_keys)
    rules = rules_for(host, known, limits or Limits(), allow_hosts, allow_origins)
    engine_options: dict[str, Any] = {
        "model": model,
        "store": Path(store).resolve(),
        "adapters": adapters,
        "pinned": pinned,
        "settings": settings or ServeSettings(),
    }
    serve_by(engine_options, host, port, known, rules, ready or (lambda *_: None))


def serve_by(
    engine_options: Mapping[str, Any], host: str, port: int, keys: Keys | None, rules: Mapping[str, Any], ready: OnReady
) -> None:
    """Listen, open the engine that is asked for, and answer until a signal.

    Args:
        asked: what `open_engine` takes.
        rules: of `rules_for`.
    """
    with open_socket(host, port) as opened:
        from loralab.serving.opening import open_engine  # takes seconds: the address is had first

        engine = open_engine(**engine_options)
        application = build_app(engine, keys=keys, **rules)
        where, with_keys = address(opened), keys is not None
        listener = Listener(application, opened, lambda: ready(server_info(engine), where, with_keys))
        engine.start()
        try:
            listener.listen()
        finally:
            engine.stop(drain=not listener.force_exit)


def rules_for(
    host: str, keys: Keys | None, limits: Limits, hosts: Sequence[str], origins: Sequence[str]
) -> dict[str, Any]:
    """Return who may ask, and how much.

    Raises:
        ConfigError: a name of a host or of a site is none.
    """
    allowed = origins_of(origins, with_keys=keys is not None)
    return {"limits": limits, "hosts": hosts_of(host, hosts), "origins": allowed}


def keys_for(host: str, file: Path | None, *, no_keys: bool) -> Keys | None:
    """Return the keys of a file; nothing that others can reach goes without, unless asked to.

    Raises:
        ConfigError: both or neither are given, or the file is wrong.
    """
    if file is not None:
        if no_keys:
            raise ConfigError("give either --keys or --no-keys", code="keys_and_no_keys", field="keys")
        return read(file)
    if not no_keys and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by others: give --keys keys.toml, or --no-keys to let "
            "everyone ask and load adapters",
            code="needs_keys",
            field="keys",
        )
    return None
