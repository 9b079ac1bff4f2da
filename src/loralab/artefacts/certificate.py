"""Reload an artefact in a fresh process, compare its logits, verdict; verify() repeats it.

An artefact is an adapter folder, or a model folder that `merge` wrote. Its certificate stands in
`loralab.json`; `certificate.safetensors` keeps what was compared, so that it can be compared
again later without the live model: the prompts, and for the last positions of each the largest
logits with the log-sum-exp over all.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab import atomic
from loralab.adapters import folder, registry
from loralab.adapters.folder import RECORD, read_json
from loralab.adapters.record import sound
from loralab.artefacts import gguf_adapter
from loralab.artefacts.comparison import STORED_LOGITS, Certificate, Reference, compare, logits_of, reference_of
from loralab.artefacts.loaded_adapter import load_with_base, on_base
from loralab.artefacts.temporary_base import TEMPORARY
from loralab.errors import (
    AdapterFileError,
    BaseMismatchWarning,
    CertificateError,
    ConfigError,
    LoralabError,
    join_limited,
)
from loralab.models import load as models
from loralab.models.device import device_here
from loralab.models.load import Base
from loralab.models.source import has_tokenizer, resolve
from loralab.progress import Listener, stages

REFERENCE = "certificate.safetensors"
STARTING, LOADING, ASKING = "starting a fresh process", "reloading it there", "comparing its answers"
FRESH = {STARTING: 3, LOADING: 2, ASKING: 1}  # shares of its time
Begin = Callable[[str], None]
_SILENT = stages(FRESH)
OF_A_HUB = ("README.md", ".gitattributes")  # files that hold nothing of a model, and come and go


def certify(
    artefact: str | Path,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    kind: str,
    tokenizer: Any = None,
    base: str | Path | None = None,
) -> Certificate:
    """Reload an artefact in a fresh process and compare it with the live model.

    The certificate is written into the artefact, passed or not.

    Args:
        prompts: token ids, or samples of another kind (tasks/samples.py).
        tokenizer: what turns a sample into pixels; for pictures only.
        base: folder or hub id of an adapter's base, which needs no tokenizer, such as a temporary
            copy; None is the one that the artefact names.

    Raises:
        CertificateError: the artefact does not do what the live model does.
    """
    path = Path(artefact)
    certificate = compare_afresh(path, reference_of(model, prompts, kind, tokenizer), base)
    if not certificate.passed:
        raise CertificateError(_verdict(path, certificate), code="not_equal", field="artefact")
    return certificate


def compare_afresh(
    path: Path, reference: Reference, base: str | Path | None = None, begin: Begin = _SILENT
) -> Certificate:
    """Compare in a fresh process, and leave certificate and reference in the artefact.

    Args:
        base: of an adapter, such as a temporary copy; None is the one that it names.
        begin: called with each stage of FRESH.
    """
    with warnings.catch_warnings():  # what is to be said of its base was said when it was loaded
        warnings.simplefilter("ignore", BaseMismatchWarning)
        certificate = _in_fresh_process(path, reference, base, begin)
    if base is not None and sound(read_json(path / RECORD)).get("base", {}).get("live"):
        certificate = replace(certificate, base=TEMPORARY)
    reference.smaller(STORED_LOGITS).save(path / REFERENCE)
    digest = _sha256(path / REFERENCE)
    folder.update_record(path, certificate={**certificate.to_json(), "reference": digest})
    return certificate


def verify(artefact: str | Path, *, base: str | Path | None = None, listener: Listener | None = None) -> Certificate:
    """Check every file's digest, reload in a fresh process, compare with the stored reference.

    Args:
        base: the base model of an adapter; None is the one that it names.

    What of the base is not as it was in training, such as its chat template, which no comparison
    of token ids can see, is a BaseMismatchWarning.

    Raises:
        AdapterFileError: there is no artefact with a certificate at this place, or it was trained
            on a live model and `base` is not given.
        CertificateError: it is not, or does not do, what was certified.
    """
    path = Path(artefact)
    record = certified_record(path)
    _require_base(path, record, base)
    with _as_difference(path):
        changed = _changed_files(path, record)
        if changed:
            raise CertificateError(
                f"{path}: changed since it was certified: {join_limited(changed)}", code="changed", field=changed[0]
            )
        reference = replace(Reference.read(path / REFERENCE), device=_device_of(record["certificate"]))
        certificate = _in_fresh_process(path, reference, base, stages(FRESH, listener))
    if not certificate.passed:
        raise CertificateError(_verdict(path, certificate), code="not_equal", field="artefact")
    return replace(certificate, base=None if base is None else str(base))


def certified_record(path: Path) -> dict[str, Any]:
    """Return the record of an artefact that has a certificate.

    Raises:
        AdapterFileError: there is none at this place.
    """
    if not (path / RECORD).is_file():
        raise AdapterFileError(
            f"{path} has no {RECORD}; a merge by another tool is verified with --base and --adapter",
            code="no_record",
            field="path",
        )
    record = read_json(path / RECORD)
    if not isinstance(record.get("certificate"), Mapping):
        raise AdapterFileError(
            f"{path} has no certificate; it was never compared with a model", code="no_certificate", field="path"
        )
    return record


def _require_base(path: Path, record: Mapping[str, Any], base: str | Path | None) -> None:
    """Refuse an adapter whose base has no folder, and a base for what needs none."""
    if base is not None and not (path / folder.CONFIG).is_file():
        raise ConfigError(
            f"{path} is not an adapter folder; it is verified without --base", code="no_effect", field="base"
        )
    if base is not None:
        resolve(str(base))
    elif record.get("kind") != "model" and sound(record).get("base", {}).get("live"):
        raise AdapterFileError(
            f"{path} was trained on a live model, whose base has no folder; name it with --base",
            code="base_needed",
            field="base",
        )


def _device_of(certificate: Mapping[str, Any]) -> str:
    """Return the kind of device that was certified on, if there is one here, else the processor."""
    here = device_here().type
    return here if certificate.get("device") == here else "cpu"


def file_digests(path: Path) -> dict[str, str]:
    """Return the sha256 of every file of a model folder but the record, the reference, and those of a hub."""
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    return {name: _sha256(path / name) for name in names if name not in (RECORD, REFERENCE, *OF_A_HUB)}


def _changed_files(path: Path, record: Mapping[str, Any]) -> list[str]:
    changed = []
    if record["certificate"].get("reference") != _sha256(path / REFERENCE):
        changed.append(REFERENCE)
    if "files" in record:
        now = file_digests(path)
        files: Mapping[str, str] = record["files"]
        if not isinstance(files, Mapping):
            raise CertificateError(f"{path / RECORD}: files must be an object", code="invalid_record", field="files")
        changed += [n for n in sorted({*now, *files}) if now.get(n) != files.get(n) and n not in OF_A_HUB]
    else:
        folder.read(path)  # compares the content digest
    return changed


@contextmanager
def _as_difference(path: Path) -> Iterator[None]:
    """Report what can no longer be read as a difference from what was certified."""
    try:
        yield
    except CertificateError:
        raise
    except (LoralabError, OSError) as error:
        raise CertificateError(
            f"{path} is no longer what was certified: {error}", code="changed", field="path"
        ) from None


def _in_fresh_process(path: Path, reference: Reference, base: str | Path | None, begin: Begin) -> Certificate:
    begin(STARTING)
    with atomic.explained("a temporary folder ($TMPDIR says where)"):
        temporary = tempfile.TemporaryDirectory()
    with temporary as place:
        request, answer = Path(place) / "reference.safetensors", Path(place) / "answer.json"
        reference.save(request)
        command = [sys.executable, "-m", __name__]
        command += [str(path), str(request), str(answer), reference.device]
        command += [] if base is None else [str(base)]
        # as many threads as here: sums in another order would differ in the last bit
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment = {**os.environ, **registry.environment(), **threads}
        said = Path(place) / "stderr"
        code = _followed(command, environment, said, begin)
        if not answer.is_file():
            lines = said.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise CertificateError(
                f"{path} cannot be loaded in a fresh process: {lines[-1]}", code="cannot_load", field="path"
            )
        return _read_answer(answer)


def _followed(command: list[str], environment: Mapping[str, str], said: Path, begin: Begin) -> int:
    """Run a process, tell which stage it says to be in, and return its exit code; its errors go to a file."""
    with said.open("w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert child.stdout is not None
    try:
        with child.stdout as lines:
            for line in lines:
                if (stage := line.strip()) in FRESH:
                    begin(stage)
        return child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _read_answer(file: Path) -> Certificate:
    """Return the certificate that the fresh process has written; its warnings are ours."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for text in found["warnings"]:
        warnings.warn(text, BaseMismatchWarning, stacklevel=3)
    return Certificate(**found["certificate"])


def _reload(path: Path, device: str, base: str | None) -> tuple[Base, str]:
    """Return an artefact as a model on a device, and its precision.

    Args:
        base: of an adapter folder; None is the one that it names.
    """
    if (path / gguf_adapter.FILE).is_file():
        with tempfile.TemporaryDirectory() as place:
            unpacked = _unpacked(path, Path(place) / "adapter", base)
            live = load_with_base(unpacked, model=base, device=device)
        return live.base, live.precision
    if (path / folder.CONFIG).is_file():
        if base is None or has_tokenizer(base):
            live = load_with_base(path, model=base, device=device)
        else:
            live = on_base(path, base, device=device)
        return live.base, live.precision
    record = read_json(path / RECORD)
    precision = record["precision"]
    kind = record["base"]["kind"]
    merged = models.load(str(path), kind=kind, dtype=models.parse_dtype(precision))
    merged.model.to(device)
    return merged, precision


def _unpacked(path: Path, place: Path, base: str | None) -> Path:
    """Return the adapter folder that an exported GGUF adapter stands for."""
    kept = ("base", "task", "training", "tokenizer", "sample")
    record = {key: value for key, value in read_json(path / RECORD).items() if key in kept}
    config = models.configuration(base or record["base"]["name"])
    return folder.write(place, *gguf_adapter.read(path / gguf_adapter.FILE, config), record)


def _verdict(path: Path, found: Certificate) -> str:
    return (
        f"{path} does not do what was certified: relative logit difference "
        f"{found.relative_difference:.2e}, mean KL {found.mean_kl:.2e}, top-1 agreement "
        f"{found.top1_agreement:.3f}; allowed for {found.precision}: {found.tolerance}"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _compare_and_write(path: str, request: str, answer: str, device: str, base: str | None = None) -> None:
    """Reload, compute, compare and write the verdict, in the fresh process."""
    reference = Reference.read(Path(request))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BaseMismatchWarning)
        try:
            certificate = _compared(Path(path), reference, device, base)
        except torch.OutOfMemoryError:  # the live model still fills the accelerator
            certificate = _compared(Path(path), reference, "cpu", base)
    said = [str(w.message) for w in caught if issubclass(w.category, BaseMismatchWarning)]
    content = {"certificate": certificate.to_json(), "warnings": list(dict.fromkeys(said))}
    atomic.write_file(answer, json.dumps(content))


def _compared(path: Path, reference: Reference, device: str, base: str | None) -> Certificate:
    print(LOADING, flush=True)
    found, precision = _reload(path, device, base)
    print(ASKING, flush=True)
    logits = logits_of(found.model, reference.prompts, found.kind, found.tokenizer)
    return compare(reference, logits, precision, device)


if __name__ == "__main__":
    try:
        _compare_and_write(*sys.argv[1:])
    except LoralabError as failure:
        sys.exit(str(failure))
