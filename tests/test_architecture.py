"""Imports run one way. This table is the architecture; docs/architecture.md shows the same."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path

import pytest

from loralab.adapters.registry import built_in

ROOT = Path(__file__).parents[1] / "src" / "loralab"
BASE = {"errors", "system", "atomic", "values", "plugins", "packages", "lanes", "progress"}
LEAVES = BASE | {"native"}
TOGETHER = {"cluster"}  # several machines
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "system": set(),
    "atomic": {"errors", "system"},
    "values": {"errors", "system"},
    "plugins": {"errors"},
    "packages": {"errors", "atomic"},
    "lanes": {"system"},
    "progress": set(),
    "native": BASE,
    "cluster": {"errors"},
    "adapters": LEAVES,
    "models": BASE,
    "tasks": BASE,
    "assets": BASE | {"models", "tasks"},  # in no other set: it registers its names, and nothing imports it
    "training": LEAVES | {"adapters", "models", "tasks", "artefacts"},
    "artefacts": BASE | {"adapters", "models", "tasks"},
    "serving": LEAVES | TOGETHER | {"adapters", "models", "tasks"},
    "studies": BASE | TOGETHER | {"adapters", "models", "tasks", "training", "artefacts"},
    "integrations": BASE | {"adapters", "models", "tasks", "training", "artefacts"},
    "cli": BASE
    | {"__version__"}
    | TOGETHER
    | {"adapters", "models", "tasks", "training", "artefacts", "serving", "studies", "integrations"},
}
# third-party names, where restricted
MAY_INSTALL = {"native": {"torch"}, "adapters": {"torch", "safetensors", "regex"}}
TORCH_FREE = [
    "adapters/methods.py",
    "adapters/registry.py",
    "adapters/builtin.py",
    "serving/request.py",
    "serving/settings.py",
    "training/settings.py",
    "training/trackers.py",
    "errors.py",
    "serving/http/keys.py",
    "atomic.py",
    "values.py",
    "progress.py",
    "plugins.py",
    "packages.py",
    "models/catalog.py",
    "assets/smollm.py",
    "assets/minilm.py",
    "assets/dinov2.py",
    "cluster.py",
    "studies/study.py",
    "studies/catalog.py",
    "studies/fields.py",
    "studies/claims/form.py",
]


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imported(file: Path) -> frozenset[str]:
    """Dotted names that a file imports, inside functions too (relative ones: ruff TID252)."""
    names = set[str]()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part: str) -> None:
    files = list((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]
    assert files[0].exists(), f"no file for {part}"
    names = {name for file in files for name in imported(file)}
    names = {name.replace("loralab.atomic", "loralab.atomic.") for name in names}
    ours = {name.split(".")[1] for name in names if name.startswith("loralab.")}
    assert ours - MAY_IMPORT[part] - {part} == set()


@pytest.mark.parametrize("part", MAY_INSTALL)
def test_heavy_dependencies_stay_out(part: str) -> None:
    names = {name.split(".")[0] for file in (ROOT / part).rglob("*.py") for name in imported(file)}
    assert names - MAY_INSTALL[part] - set(sys.stdlib_module_names) - {"loralab"} == set()


@pytest.mark.parametrize("file", TORCH_FREE)
def test_configurations_need_the_standard_library_only(file: str) -> None:
    names = {name.split(".")[0] for name in imported(ROOT / file)}
    assert names - set(sys.stdlib_module_names) - {"loralab"} == set()


def test_a_package_holds_a_docstring_and_nothing_else() -> None:
    inner = (f"studies/{own}" for own in ("measures", "readings", "questions", "claims", "prediction"))
    for part in (*MAY_IMPORT.keys() - {"cli"}, *inner):
        if not (ROOT / part).is_dir():
            continue
        tree = tree_of(ROOT / part / "__init__.py")
        assert len(tree.body) == 1


CONFIGURATIONS = {spec.config.__name__ for spec in built_in().values()}


def names_in(node: ast.AST) -> set[str]:
    """The last parts of all names below a node."""
    below = list(ast.walk(node))
    names = {one.id for one in below if isinstance(one, ast.Name)}
    return names | {one.attr for one in below if isinstance(one, ast.Attribute)}


def methods_told_apart(tree: ast.AST) -> Iterator[int]:
    """Lines that ask which method a configuration is, by isinstance or by its type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and names_in(node.func) & {"isinstance", "issubclass"}:
            asked = {name for argument in node.args[1:] for name in names_in(argument)}
        elif isinstance(node, ast.Compare) and "type" in names_in(node):
            asked = names_in(node)
        else:
            continue
        if asked & CONFIGURATIONS:
            yield node.lineno


def test_a_method_is_known_by_its_spec_alone() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in ROOT.rglob("*.py") for line in methods_told_apart(tree_of(file))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(config, LoRA)",
        "isinstance(a.config, BitFit | FullFineTune)",
        "issubclass(kind, (IA3, Prompt))",
        "type(config) is AdaLoRA",
        "type(config) in (methods.LoRA,)",
    ],
)
def test_telling_methods_apart_is_noticed(line: str) -> None:
    assert list(methods_told_apart(ast.parse(line))) == [1]


def test_files_and_functions_stay_short() -> None:
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, file.name
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file.name}:{node.name}"


def test_files_import_each_other_in_no_circle() -> None:
    """While they are loaded; what is imported inside a function comes later."""
    files = {_dotted(file): file for file in ROOT.rglob("*.py")}
    graph = {name: set(_loaded_with(file, files)) - {name} for name, file in files.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _loaded_with(file: Path, files: Container[str]) -> Iterator[str]:
    tree = tree_of(file)
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in files else str(node.module)


HEAVY = {  # what takes a tenth of a second or more to import, or is of no use to a help text
    *("torch", "transformers", "numpy", "datasets", "pyarrow", "accelerate", "safetensors", "regex", "rich.progress"),
    *("fastapi", "uvicorn", "scipy", "altair", "jinja2", "optuna", "ray", "loralab.cli.jobs", "loralab.assets"),
}


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, loralab, loralab.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.interpreter
def test_the_short_names_of_models_are_found_without_torch() -> None:
    code = (
        "import sys\nfrom loralab.models.catalog import listing\nsys.exit(len(listing()) < 3 or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.interpreter
def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom loralab.cli import app, run\n"
        "assert run(['--help']) == 0\n"
        "names = [command.name or command.callback.__name__ for command in app.registered_commands]\n"
        "assert len(names) > 12 and not any(run([name, '--help']) for name in names)\n"
        f"sys.exit(', '.join(sorted({HEAVY!r} & sys.modules.keys())) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_every_file_of_the_package_is_installed() -> None:
    found = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = found["tool"]["setuptools"]["package-data"]["loralab"]
    files = {f for f in ROOT.rglob("*") if f.is_file() and f.suffix not in {".py", ".pyc"}}
    assert not files - {f for pattern in patterns for f in ROOT.glob(pattern)}
