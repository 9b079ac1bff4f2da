"""vLLM's own server as a child process: the same base and adapters in another engine.

vLLM lives where its requirements allow it to, often in an environment of its own; here it is
started with what `loralab serve` was asked for, watched until it answers, and ended with it.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from loralab.errors import ConfigError
from loralab.serving.settings import ServeSettings

INSTALL = (
    "give it an environment of its own: python -m venv vllm-env && vllm-env/bin/pip install vllm, "
    "then --engine-python vllm-env/bin/python"
)
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOGETHER = 16  # adapters in one batch; each takes its own memory in every layer
# Places for adapters loaded later. The last must stay empty: on processors vLLM 0.32 gives rows
# without an adapter the one in the last place, where a batch has both (index -1 of a tensor).
SPARE = 4
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
PAUSE = 0.2  # seconds between two questions whether it answers


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Options of a vLLM server.

    Attributes:
        python: that has vLLM.
        source: of the base: a folder or a hub id.
        name: of the base, for clients.
        adapters: name -> folder that vLLM can read.
        rank: the largest, as vLLM's --max-lora-rank takes it.
        store: where paths of adapters loaded later begin.
        further: arguments of vLLM's own.
    """

    python: str
    source: str
    name: str
    adapters: Mapping[str, Path]
    rank: int
    store: Path
    host: str
    port: int
    settings: ServeSettings
    further: Sequence[str] = ()


def find_python(given: str | None) -> str:
    """Return a Python that has vLLM.

    Args:
        given: None is the one that runs this.

    Raises:
        ConfigError: there is none, or it has no vLLM.
    """
    if given is None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(f"vLLM is not installed beside loralab; {INSTALL}", code="no_vllm", field="engine_python")
        return sys.executable
    found = shutil.which(given)
    if found is None:
        raise ConfigError(f"--engine-python {given} is not a program", code="no_program", field="engine_python")
    if subprocess.run([found, "-c", HAS_VLLM], check=False, env=_environment(found)).returncode:
        raise ConfigError(f"--engine-python {given} has no vLLM; {INSTALL}", code="no_vllm", field="engine_python")
    return str(Path(found).absolute())  # not resolved: a link is how an environment is named


def command(options: VllmOptions) -> list[str]:
    """Return the command line of vLLM's server, by the module that every version has."""
    settings = options.settings
    together = min(len(options.adapters) + SPARE, TOGETHER)
    found = [
        options.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        options.source,
        "--served-model-name",
        options.name,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--dtype",
        DTYPES[settings.precision],
        "--max-num-seqs",
        str(settings.max_batch),
        "--enable-lora",
        "--max-lora-rank",
        str(options.rank),
        "--max-loras",
        str(together),
        "--max-cpu-loras",
        str(max(settings.resident, together)),
    ]
    if settings.max_length is not None:
        found += ["--max-model-len", str(settings.max_length)]
    if options.adapters:
        found += ["--lora-modules", *(f"{name}={path}" for name, path in options.adapters.items())]
    return [*found, *options.further]


def run(options: VllmOptions, ready: Callable[[], None]) -> int:
    """Serve until vLLM ends or a signal ends it; its exit code, 128 + n after signal n.

    SIGINT and SIGTERM are passed on. What vLLM prints goes to standard error.

    Args:
        ready: called once it answers.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        **_environment(options.python),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    }
    child = subprocess.Popen(command(options), cwd=options.store, env=environment, stdout=2, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        if _answers(child, options):
            ready()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()
    return code if code >= 0 else 128 - code


def _answers(child: subprocess.Popen[bytes], options: VllmOptions) -> bool:
    """Wait until it does; False where it ended before."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    while child.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{host}:{options.port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(PAUSE)
    return False


def _environment(python: str) -> dict[str, str]:
    """Return the environment without variables that would lead another Python to these packages."""
    found = dict(os.environ)
    if python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME"):
            found.pop(name, None)
    return found
