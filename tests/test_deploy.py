"""Files of deploy/: what they name exists, and their ports, paths, options and limits are the server's."""

import inspect
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving.fakes import FakeEngine, digest_of
from serving.served import engine, listening  # noqa: F401  (a fixture)
from starlette.testclient import TestClient
from typer.exceptions import TyperException

import loralab
from loralab.cli import load_commands, serve
from loralab.errors import ConfigError
from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Key, Keys, read
from loralab.serving.settings import Limits

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PORT = 8000
KEYS_FILES = "keys.toml"
SECONDS, BYTES = {"s": 1, "m": 60}, {"k": 2**10, "m": 2**20}


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def load(name: str) -> Any:
    return yaml.safe_load(text(name))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Return what a command makes of its arguments, as typing them would; unknown options raise."""
    command = load_commands(arguments)
    name, rest = "loralab", arguments
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    with command.make_context(name, rest) as context:
        return dict(context.params)


def instructions() -> list[tuple[str, str]]:
    """Return (word, rest) of each instruction of the Dockerfile, in order."""
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def all_of(word: str) -> list[str]:
    return [rest for own, rest in instructions() if own == word]


def container() -> dict[str, Any]:
    pod = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    return dict(pod["containers"][0])


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each file and a command of loralab in it."""
    yield "Dockerfile", yaml.safe_load(all_of("CMD")[0])
    yield "deployment", container()["args"]
    yield "compose", load("compose.yaml")["services"]["loralab"]["command"]
    for part in (load("skypilot.yaml")["setup"], load("skypilot.yaml")["run"], "\n".join(all_of("RUN"))):
        for line in re.findall(r"bin/loralab (.+)", part):
            yield "skypilot or RUN", shlex.split(line.replace("$MODEL", "smollm2-135m").replace("$ASSETS", "digits"))


@pytest.mark.parametrize(("place", "command"), [pytest.param(*found, id=found[0]) for found in commands()])
def test_every_option_is_one_of_the_command(place: str, command: list[str]) -> None:
    given = parsed(command)
    if command[0] == "serve":
        assert given["port"] == PORT and given["keys"] is not None and given["store"] is not None, place


def test_an_option_that_there_is_not_is_noticed() -> None:
    with pytest.raises(TyperException):
        parsed(["serve", "--no-such-thing"])


def test_the_port_is_the_usual_one() -> None:
    assert inspect.signature(serve.serve).parameters["port"].default == PORT
    assert all_of("EXPOSE") == [str(PORT)]
    assert {str(PORT)} == set(re.findall(r"127\.0\.0\.1:(\d+)", text("nginx.conf") + "".join(all_of("HEALTHCHECK"))))
    assert load("skypilot.yaml")["resources"]["ports"] == PORT
    (port,) = container()["ports"]
    assert port["containerPort"] == PORT
    (service,) = load("kubernetes/service.yaml")["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    (published,) = load("compose.yaml")["services"]["loralab"]["ports"]
    assert published.rpartition(":")[2] == re.findall(r"listen (\d+)", text("nginx.conf"))[0]


def test_probes_ask_what_is_open_without_a_key(engine: FakeEngine) -> None:  # noqa: F811
    paths = {container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    paths |= set(re.findall(r"127\.0\.0\.1:\d+(/\w+)", all_of("HEALTHCHECK")[0]))
    keys = Keys([Key(name="a", sha256=b"0" * 32)])
    with TestClient(build_app(engine, keys=keys), base_url="http://127.0.0.1") as client:
        assert {client.get(path).status_code for path in paths} == {200}
        assert client.get("/v1/models").status_code == 401


def test_manifests_name_each_other() -> None:
    found = {one["kind"]: one for one in (yaml.safe_load(file.read_text(encoding="utf-8")) for file in MANIFESTS)}
    assert found.keys() == {"Deployment", "Service", "Secret", "PersistentVolumeClaim"}
    spec = found["Deployment"]["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    volumes = {own["name"]: own for own in pod["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == found["Secret"]["metadata"]["name"]
    assert volumes["store"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    mounts = {own["name"]: own["mountPath"] for own in container()["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    given = parsed(container()["args"])
    assert str(given["store"]) == mounts["store"] and str(given["keys"].parent) == mounts["keys"]
    assert given["keys"].name in found["Secret"]["stringData"]
    assert container()["image"].endswith(f":{loralab.__version__}")
    assert pod["securityContext"]["runAsUser"] == int(all_of("USER")[0])
    assert {"cpu", "memory"} <= container()["resources"]["limits"].keys()
    assert f"LORALAB_CACHE={mounts['cache']}" in all_of("ENV")[0]
    assert pod["terminationGracePeriodSeconds"] > Limits().timeout


def test_compose_mounts_what_the_server_reads() -> None:
    found = load("compose.yaml")
    own = found["services"]["loralab"]
    given = parsed(own["command"])
    assert f"/run/secrets/{own['secrets'][0]}" == str(given["keys"]) and set(found["secrets"]) == set(own["secrets"])
    assert {volume.partition(":")[2].partition(":")[0] for volume in own["volumes"]} == {"/store", "/cache"}
    assert str(given["store"]) == "/store" and given["host"] == "127.0.0.1"  # nginx alone is published
    assert given["allow_host"] == re.findall(r"server_name (\S+);", text("nginx.conf"))
    assert (DEPLOY / own["build"]["context"] / own["build"]["dockerfile"]).is_file()
    mounted = found["services"]["nginx"]["volumes"][0].partition(":")[0]
    assert (DEPLOY / mounted).is_file()


def test_no_server_starts_with_a_key_that_everyone_knows(tmp_path: Path) -> None:
    for content in (text("keys.example.toml"), load("kubernetes/secret.yaml")["stringData"][KEYS_FILES]):
        (tmp_path / KEYS_FILES).write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError):
            read(tmp_path / KEYS_FILES)
        (tmp_path / KEYS_FILES).write_text(content.replace("REPLACE", "5" * 64), encoding="utf-8")
        assert [key.name for key in read(tmp_path / KEYS_FILES).keys] == ["team"]


def test_the_image_is_built_of_what_is_here() -> None:
    kept = {line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    copied = [name for rest in all_of("COPY") if "--from" not in rest for name in rest.split()[:-1]]
    assert set(copied) == kept and all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    arguments = dict(rest.split("=", 1) for rest in all_of("ARG"))
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)
    assert f"torch=={arguments['TORCH']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def settings(name: str) -> str:
    (found,) = set(re.findall(rf"\b{name} ([^;]+);", text("nginx.conf")))
    return found


def seconds(name: str) -> float:
    value = settings(name)
    return float(value[:-1]) * SECONDS[value[-1]]


def test_nginx_waits_as_long_and_takes_as_much_as_the_server() -> None:
    limits = Limits()
    size = settings("client_max_body_size")
    assert int(size[:-1]) * BYTES[size[-1]] == limits.body_bytes
    assert seconds("proxy_read_timeout") > limits.timeout
    assert seconds("keepalive_timeout") < limits.keep_alive
    assert seconds("client_body_timeout") == limits.body_seconds
    assert seconds("client_header_timeout") == limits.head_seconds
    assert settings("proxy_buffering") == "off"


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture
def nginx(engine: FakeEngine, tmp_path: Path) -> Iterator[str]:  # noqa: F811
    """Run nginx with our settings in front of a server; gives its address."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    with listening(engine, None, None) as where:
        own = text("nginx.conf").replace("127.0.0.1:8000", where.removeprefix("http://"))
        (tmp_path / "loralab.conf").write_text(own.replace("listen 8080", f"listen 127.0.0.1:{port}"), encoding="utf-8")
        places = (
            f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.geteuid() == 0 else ""
        (tmp_path / "nginx.conf").write_text(
            f"{user} daemon off; pid {tmp_path}/pid; events {{}}"
            f"http {{ access_log off; {' '.join(places)} include {tmp_path}/loralab.conf; }}",
            encoding="utf-8",
        )
        start = [program, "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "nginx.conf")]
        checked = subprocess.run([*start, "-t"], check=False, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        process = subprocess.Popen(start)
        try:
            yield answering(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(20)


def answering(where: str) -> str:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if httpx.get(f"{where}/health").status_code == 200:
                return where
        except httpx.ConnectError:
            time.sleep(0.05)
    raise AssertionError(where)


def test_each_token_passes_nginx_as_it_comes(nginx: str, engine: FakeEngine) -> None:  # noqa: F811
    engine.held_after = 2
    body = {"model": "sst", "prompt": "good", "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{nginx}/v1/completions", json=body, timeout=20) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        first = [next(lines), next(lines)]  # while the rest is held back
        assert not engine.gate.is_set() and all("text" in line for line in first)
        engine.held_after = None
        engine.gate.set()
        assert len(list(lines)) >= 4
    assert answer.headers["x-loralab-digest"] == digest_of("sst")


def test_nginx_refuses_what_the_server_would(nginx: str) -> None:
    large = b"x" * (Limits().body_bytes + 1)
    assert httpx.post(f"{nginx}/v1/completions", content=large, timeout=60).status_code == 413
    assert httpx.get(f"{nginx}/health", headers={"Host": "other.example.org"}).status_code == 421


@pytest.mark.slow
def test_the_steps_of_the_image_run(tmp_path: Path) -> None:
    """In a copy of the context; torch and all else stand in this environment, which is seen from there."""
    place, target = tmp_path / "src", tmp_path / "loralab"
    for rest in all_of("COPY"):
        for name in rest.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            elif (ROOT / name).is_file():
                place.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, place / name)
    arguments = dict(rest.split("=", 1) for rest in all_of("ARG"))
    steps = [rest for rest in all_of("RUN") if not rest.startswith(("apt-get", "useradd"))]
    assert len(steps) == 4
    environment = {**os.environ, **arguments, "TORCH_INDEX": "", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
    environment.pop("PYTHONPATH", None)
    for step in steps:
        line = step.replace("/opt/loralab", str(target)).replace("python -m venv", f"{sys.executable} -m venv")
        done = subprocess.run(
            ["sh", "-ec", line], cwd=place, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{step}: {done.stderr[-1500:]}"
        site = target / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (site / "seen.pth").write_text(
            next(p for p in sys.path if p.endswith("site-packages")) + "\n", encoding="utf-8"
        )
    assert (site / "loralab" / "py.typed").is_file()
    command = [str(target / "bin" / "loralab"), "serve", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "--allow-host" in done.stdout
