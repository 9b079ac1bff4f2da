"""The ecosystem's tools against `loralab serve`: each does its own work with two adapters, or it is said why not.

The base is SmolLM2-135M with a chat template of Hermes' form, so that tools can be called. The tools have
environments of their own (`make clients`); the table goes to docs/clients.md.

    python benchmarks/clients.py [--environments .venv-clients] [--vllm PYTHON] [--only NAME ...] [--write]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import httpx
from served import serving, write_adapters
from sides import parser, table

import loralab
from loralab.models.load import load

HERE = Path(__file__).parent
DRIVERS = HERE / "clients"
DOCUMENT = HERE.parent / "docs" / "clients.md"
LIMIT = 900  # seconds that a tool may take
TEMPLATE = """{% if tools %}<|im_start|>system
Call a function with <tool_call>
{"name": "...", "arguments": {...}}
</tool_call>. Functions: {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HEAD = """# The ecosystem's tools with `loralab serve`

`make clients` installs the tools in environments of their own, starts a server with two adapters on
SmolLM2-135M, and lets each tool do its work; `benchmarks/clients.py --write` writes this table. Nothing of
the tools is changed: they get the server's address and the names of its adapters. vLLM is not installed by it:
`--vllm PYTHON` names a Python that has it. What each does: [`benchmarks/clients/`](../benchmarks/clients).

"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool.

    Attributes:
        environment: the name of the one whose Python runs it; "vllm" is not made by `make clients`.
        does: what is tried.
        command: after the Python; {url}, {base}, {adapter}, {other} and {tokenizer} are filled in.
    """

    environment: str
    does: str
    command: Sequence[str]


def driver(name: str, *more: str) -> list[str]:
    """Return the command of a script beside this one."""
    return [str(DRIVERS / name), "{url}", "{base}", "{adapter}", "{other}", *more]


TOOLS = {
    "openai": Tool(
        environment="main",
        does="models, chat, streams, logprobs, `parse`, tools also in a stream, `echo`",
        command=driver("openai_client.py"),
    ),
    "litellm": Tool(
        environment="main",
        does="chat, stream, a pydantic `response_format`, text completion",
        command=driver("litellm_client.py"),
    ),
    "langchain-openai": Tool(
        environment="main",
        does="invoke, stream, `with_structured_output` both ways, `bind_tools`",
        command=driver("langchain_client.py"),
    ),
    "instructor": Tool(
        environment="instructor", does="modes TOOLS and JSON_SCHEMA", command=driver("instructor_client.py")
    ),
    "guidellm": Tool(
        environment="main",
        does="synthetic text, one request after the other, to both endpoints; no request failed",
        command=driver("guidellm_client.py", "{tokenizer}"),
    ),
    "lm-eval": Tool(
        environment="main",
        does="`local-completions`: multiple choice, rolling perplexity, written answers; `local-chat-completions`",
        command=driver("lm_eval_client.py", "{tokenizer}"),
    ),
    "vllm bench": Tool(
        environment="vllm",
        does="`vllm bench serve` with random prompts; all completed",
        command=driver("vllm_bench_client.py", "{tokenizer}"),
    ),
    "AI SDK": Tool(
        environment="node",
        does="text, stream, an object by zod, tools also in a stream",
        command=driver("ai_sdk_client.mjs"),
    ),
}


def write_base(place: Path) -> None:
    """Write the base with a template that knows tools, and two adapters beside it."""
    source = Path(loralab.resolve("smollm2-135m"))
    base = place / "smollm2-tools"
    shutil.copytree(source, base, copy_function=os.symlink)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    told = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    told.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_adapters(load(str(base)), [place / "store" / name for name in ("first", "second")], rank=4)


def make_structures(url: str, model: str) -> None:
    """Let the server make what structures need of its tokenizer: on a busy machine that takes seconds, once."""
    messages = [{"role": "user", "content": "?"}]
    body = {"model": model, "messages": messages, "max_tokens": 1, "response_format": {"type": "json_object"}}
    for _ in range(4):
        if httpx.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT).status_code == 200:
            return
        time.sleep(5)


@contextmanager
def server(place: Path) -> Iterator[dict[str, str]]:
    """Serve the two adapters; yields what commands are filled in with."""
    with serving(str(place / "smollm2-tools"), place / "store") as told:
        make_structures(told["url"], told["model"])
        yield {
            "url": told["url"],
            "base": told["model"],
            "adapter": "first",
            "other": "second",
            "tokenizer": str(place / "smollm2-tools"),
        }


def attempt(tool: Tool, program: str, filled: Mapping[str, str], environments: Path) -> tuple[bool, str]:
    """Run a tool; return whether it passed, and its version or what went wrong."""
    command = [part.format(**filled) for part in tool.command]
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    own |= {"HF_HUB_OFFLINE": "1", "CLIENTS_NODE": str((environments / "node").resolve())}
    try:
        done = subprocess.run(
            [program, *command], capture_output=True, text=True, check=False, timeout=LIMIT, env=own, cwd=filled["cwd"]
        )
    except subprocess.TimeoutExpired:
        return False, f"not done within {LIMIT} s"
    if done.returncode:
        lines = [line.strip() for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line]
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return False, (named or lines or [f"exit code {done.returncode}"])[-1][:200]
    lines = [line for line in done.stdout.splitlines() if line.startswith("version ")]
    return bool(lines), lines[-1].split()[1] if lines else "the driver did not end"


def program_of(tool: Tool, environments: Path, vllm: str) -> str | None:
    """Return what runs a tool; None where it is not installed."""
    if tool.environment == "node":
        return shutil.which("node") if (environments / "node" / "node_modules" / "ai").is_dir() else None
    if tool.environment == "vllm" and vllm:
        return vllm
    found = environments / tool.environment / "bin" / "python"
    return str(found.absolute()) if found.exists() else None


def main() -> None:
    """Try every tool, print the table, and exit 1 if one that is installed failed."""
    options = parser(__doc__)
    options.add_argument("--environments", type=Path, default=Path(".venv-clients"))
    options.add_argument("--vllm", default="", help="the Python that has vLLM")
    options.add_argument("--only", nargs="+", choices=[*TOOLS], default=[*TOOLS])
    options.add_argument("--write", action="store_true", help="write docs/clients.md")
    chosen = options.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "written").mkdir()
        write_base(place)
        with server(place) as filled:
            for name in chosen.only:
                tool = TOOLS[name]
                program = program_of(tool, chosen.environments, chosen.vllm)
                passed, told = False, "not installed here"
                if program is not None:
                    passed, told = attempt(
                        tool, program, {**filled, "cwd": str(place / "written")}, chosen.environments
                    )
                    failed += not passed
                print(f"{name}: {'passed' if passed else 'FAILED' if program else 'left out'}: {told}", flush=True)
                rows.append(
                    (name, told if passed else "-", "passed" if passed else told.replace("|", "\\|"), tool.does)
                )
    text = table(f"As of {date.today()}:", ("tool", "version", "", "what is tried"), rows)
    if chosen.write:
        DOCUMENT.write_text(HEAD + text, encoding="utf-8")
    print(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
