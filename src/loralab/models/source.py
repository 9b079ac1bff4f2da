"""Find the files of a model by its short name, folder, GGUF file or hub id."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from transformers.utils import logging

from loralab.errors import LoralabError, ModelError, nearest
from loralab.models.catalog import MODELS
from loralab.models.convert import converted
from loralab.models.plausible import require_folder


def resolve(name: str) -> str:
    """Return the folder or hub id that transformers reads; a GGUF file is converted on the way.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    if name in MODELS:
        model = MODELS[name]
        found = model.locate()
        if found is None:
            raise ModelError(f"{name} is not installed; get it with: {model.get}", code="not_installed", field="model")
        with as_model_error(name, str(found)):
            return str(found if found.is_dir() else converted(found, name, model.convert))
    path = Path(name).expanduser()
    if not name:
        raise ModelError(
            f"the name of the model is empty; short names: {', '.join(MODELS)}", code="empty_name", field="model"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{name} is a file, but not .gguf; a model is a folder or a GGUF file",
                code="not_a_model",
                field="model",
            )
        with as_model_error(str(path), str(path)):
            return str(converted(path, path.stem))
    if path.is_dir():
        _require_model_folder(name, path)
        return str(path)
    if re.fullmatch(r"[\w\-.]+/[\w\-.]+", name) and not path.parent.is_dir():
        _require_on_hub(name)
        return name
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    hint = nearest(name, [*MODELS, *(str(p) for p in beside if _is_model(p))])
    raise ModelError(
        f"there is no model {name!r}{hint}; short names: {', '.join(MODELS)}", code="unknown_model", field="model"
    )


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def _require_model_folder(name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        found = "it is an adapter; name its base, and this with --adapter" if adapter else "it has no config.json"
        code = "adapter_as_model" if adapter else "no_config"
        raise ModelError(f"{name} is not a model folder: {found}", code=code, field="model")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise ModelError(
                f"{name} holds its weights as a pickle, which can run code; convert them to safetensors",
                code="pickle",
                field="model",
            )
        raise ModelError(f"{name} holds no weights (*.safetensors)", code="no_weights", field="model")
    require_folder(name, path)


def has_tokenizer(source: str | Path) -> bool:
    """Return whether a folder holds a tokenizer; a hub id is taken to have one."""
    path = Path(source)
    kinds = ("tokenizer*", "vocab*", "*.model", "preprocessor_config.json")
    return not path.is_dir() or any(any(path.glob(kind)) for kind in kinds)


def require_tokenizer_files(name: str, path: Path) -> None:
    if not has_tokenizer(path):
        raise ModelError(f"{name} holds no tokenizer (tokenizer.json)", code="no_tokenizer", field="model")


def _require_on_hub(name: str) -> None:
    """Ask once and briefly: transformers retries for half a minute, in a dozen lines."""
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is neither a folder nor a model {name!r} on the hub", code="no_such_model", field="model"
        ) from None
    except Exception as error:  # the client's own, the HTTP library's, the system's
        raise ModelError(
            f"there is no folder {name!r}, and the model hub cannot be asked for it "
            f"({type(error).__name__}); short names: {', '.join(MODELS)}",
            code="no_such_model",
            field="model",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports, where our own errors say it better."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def as_model_error(name: str, source: str) -> Iterator[None]:
    """Raise one line of ours for whatever transformers raises on a model that it cannot read."""
    try:
        with quiet():
            yield
    except LoralabError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"{name}: the weights are damaged or truncated ({error})", code="damaged", field="model"
        ) from error
    except Exception as error:  # its readers raise some ten unrelated kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        place = "" if source in (name, str(Path(name).expanduser())) else f" from {source}"
        raise ModelError(f"{name} cannot be read{place}: {reason}", code="unreadable", field="model") from error
