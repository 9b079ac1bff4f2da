"""A Ray cluster: joined, looked at, left again. Ray is loaded by whoever joins one, never before.

Needs the extra `ray`.
"""

import contextlib
import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loralab.errors import ConfigError

LOCAL, AUTO, CLIENT = "local", "auto", "ray://"
CLIENT_PORT = 10001
REACH_SECONDS = 5.0
INSTALL = "pip install 'loralab[ray]'"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of a cluster that is alive: its processors and accelerators as Ray counts them."""

    id: str
    name: str
    cpus: int
    gpus: int


def library(name: str = "ray") -> Any:
    """Ray, a part of it, or what it works with.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"several machines need {error.name or name}; get it with: {INSTALL}", code="not_installed", field="ray"
        ) from None


@contextlib.contextmanager
def joined(address: str, cpus: int = 1) -> Iterator[Any]:
    """Ray, connected to a cluster for as long as the block lasts.

    Args:
        address: "local" starts a cluster on this machine and ends it again; "auto" is the one
            that this machine belongs to; HOST:PORT of a head; ray://HOST:PORT from outside.
        cpus: that a cluster on this machine should have at least, be they shared.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    ray = library()
    require_reachable(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own old habits, such as CUDA_VISIBLE_DEVICES
        try:
            own: dict[str, Any] = {}
            if address == LOCAL:
                own = {"include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="loralab", **own)
        except Exception as error:  # Ray raises bare ones, too: of a node that does not start in time
            said = " ".join(str(error).split())
            raise ConfigError(
                f"--ray {address}: no cluster to join: {said:.200}", code="no_cluster", field="ray"
            ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def require_reachable(address: str) -> None:
    """Something must listen at an address, found out in seconds: Ray itself waits for minutes.

    Raises:
        ConfigError: nothing does, or it is not an address.
    """
    if address in (LOCAL, AUTO):
        return
    plain, client = address.removeprefix(CLIENT), address.startswith(CLIENT)
    host, colon, port = plain.rpartition(":")
    if client and not colon:
        host, port = plain, str(CLIENT_PORT)
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"--ray expects {LOCAL}, {AUTO}, HOST:PORT or {CLIENT}HOST:PORT, got {address!r}",
            code="invalid_value",
            field="ray",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--ray {address}: nothing answers there ({reason}); start a cluster with "
            "ray start --head, or use --ray local",
            code="no_answer",
            field="ray",
        ) from None


def nodes(ray: Any) -> list[Node]:
    """Return the machines that are alive."""
    return [
        Node(
            id=found["NodeID"],
            name=found["NodeName"],
            cpus=int(found["Resources"].get("CPU", 0)),
            gpus=int(found["Resources"].get("GPU", 0)),
        )
        for found in ray.nodes()
        if found["Alive"]
    ]


def on(node: Node) -> Any:
    """Return the strategy that puts a task on one machine and no other."""
    strategies = library("ray.util.scheduling_strategies")
    return strategies.NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
