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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from loralab import atomic
from loralab.adapters import folder, registry
from loralab.adapters.folder import RECORD, read_json, read_tensors
from loralab.artefacts import gguf_adapter
from loralab.artefacts.live import bring_to_life, on_base
from loralab.errors import (
    AdapterFileError,
    BaseMismatchWarning,
    CertificateError,
    LoralabError,
    some,
)
from loralab.models import load as models
from loralab.models.device import device_here
from loralab.models.load import Base
from loralab.tasks.samples import outputs

REFERENCE = "certificate.safetensors"
KEPT = 64
TOLERANCES: dict[str, dict[str, float]] = {
    # Reloading is the same computation. Merging rounds every weight once, and moved SmolLM2-135M
    # by a relative 3e-6, 4e-3 and 4e-2, with a mean KL of 1e-11, 4e-5 and 2e-3 (docs/findings.md).
    # KL grows with the square of the difference: fp32 has room for ten times, bf16 for three.
    "fp32": {"relative_difference": 3e-5, "mean_kl": 1e-9, "top1_agreement": 0.99},
    "bf16": {"relative_difference": 0.15, "mean_kl": 0.02, "top1_agreement": 0.9},
    "fp16": {"relative_difference": 0.02, "mean_kl": 1e-3, "top1_agreement": 0.97},
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How far an artefact's logits are from the live model's.

    `relative_difference` is max |d logit| over the largest |logit|; `mean_kl` in nats, from live
    to reloaded; both over the last positions of the task's own prompts. `device` is the kind of
    device that the reloaded one computed on.
    """

    max_logit_difference: float
    relative_difference: float
    mean_kl: float
    top1_agreement: float
    precision: str
    prompts: int
    positions: int
    tolerance: dict[str, float]
    passed: bool
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """All fields, for loralab.json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Logits to compare with: values (P, K) at indices (P, K), log-sum-exp over all (P,).

    The sum is kept in fp64: half a unit of fp32 at 20 nats is 1e-6, as much as fp32 is allowed.
    `device` is the one that they were computed on, and `base` the place of an adapter's base where
    that is not the one that its folder names; neither is written.
    """

    prompts: list[list[int]]
    values: Tensor
    indices: Tensor
    total: Tensor
    device: str = "cpu"
    base: str = ""

    def smaller(self, kept: int) -> "Reference":
        """With the largest logits alone."""
        values, places = self.values.topk(min(kept, self.values.shape[1]), dim=1)
        indices = self.indices.gather(1, places)
        return replace(self, values=values.contiguous(), indices=indices.contiguous())

    def save(self, file: Path) -> None:
        """Write it as safetensors, the prompts as tensors of ids."""
        tensors = {f"prompt.{i}": torch.tensor(ids) for i, ids in enumerate(self.prompts)}
        tensors |= {"values": self.values, "indices": self.indices.int(), "total": self.total}
        atomic.write_file(file, safetensors.torch.save(tensors))

    @staticmethod
    def read(file: Path) -> "Reference":
        """Read it back."""
        tensors = read_tensors(file)
        count = sum(name.startswith("prompt.") for name in tensors)
        try:
            prompts = [tensors[f"prompt.{i}"] for i in range(count)]
            values, indices, total = (tensors[name] for name in ("values", "indices", "total"))
        except KeyError as error:
            raise AdapterFileError(f"{file} is damaged: it lacks {error}") from None
        whole = not any(t.is_floating_point() for t in (*prompts, indices))
        if values.ndim != 2 or values.shape != indices.shape or total.shape != values.shape[:1]:
            raise AdapterFileError(f"{file} is damaged: its tensors do not fit each other")
        if not whole or any(t.ndim != 1 for t in prompts):
            raise AdapterFileError(f"{file} is damaged: prompts and indices must be whole numbers")
        return Reference(
            prompts=[t.tolist() for t in prompts], values=values, indices=indices.long(),
            total=total,
        )  # fmt: skip


@torch.no_grad()
def logits_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], kind: str, tokenizer: Any = None
) -> Tensor:
    """(P, V) in fp32: the last positions of each prompt, or one row a prompt for a classifier.

    Args:
        prompts: token ids, or samples of another kind (tasks/samples.py).
        tokenizer: what turns a sample into pixels; for pictures only.
    """
    was_training = model.training
    model.eval()
    rows = [outputs(model, prompt, kind=kind, tokenizer=tokenizer) for prompt in prompts]
    model.train(was_training)
    return torch.cat(rows)


def reference_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], kind: str, tokenizer: Any = None
) -> Reference:
    """All logits of a live model on some prompts."""
    logits = logits_of(model, prompts, kind, tokenizer)
    indices = torch.arange(logits.shape[1]).expand(logits.shape).contiguous()
    total = logits.double().logsumexp(dim=1)
    return Reference(
        prompts=[list(ids) for ids in prompts],
        values=logits,
        indices=indices,
        total=total,
        device=next(model.parameters()).device.type,
    )


def compare(
    reference: Reference, logits: Tensor, precision: str, device: str = "cpu"
) -> Certificate:
    """The verdict on logits (P, V), found on a device, that should be those of the reference."""
    values = reference.values.double()
    found = logits.double().gather(1, reference.indices)
    difference = float((found - values).abs().max())
    p_log = values - reference.total.double()[:, None]
    q_log = found - logits.double().logsumexp(dim=1, keepdim=True)
    kl = _kl(p_log, q_log)
    best = reference.indices.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]
    agreement = float((logits.argmax(dim=1) == best).double().mean())
    relative = difference / max(float(values.abs().max()), 1e-12)
    tolerance = TOLERANCES[precision]
    finite = bool(logits.isfinite().all())
    passed = (
        finite
        and relative <= tolerance["relative_difference"]
        and kl <= tolerance["mean_kl"]
        and agreement >= tolerance["top1_agreement"]
    )
    return Certificate(
        max_logit_difference=difference, relative_difference=relative, mean_kl=kl,
        top1_agreement=agreement, precision=precision, prompts=len(reference.prompts),
        positions=len(values), tolerance=dict(tolerance), passed=passed, device=device,
    )  # fmt: skip


def certify(
    artefact: str | Path, model: nn.Module, prompts: Sequence[Sequence[int]], *, kind: str,
    tokenizer: Any = None, base: str | Path | None = None,
) -> Certificate:  # fmt: skip
    """Reload an artefact in a fresh process and compare it with the live model.

    The certificate is written into the artefact, passed or not.

    Args:
        prompts: token ids, or samples of another kind (tasks/samples.py).
        tokenizer: what turns a sample into pixels; for pictures only.
        base: folder or hub id of an adapter's base, for which it needs no tokenizer; None is the
            one that the artefact names.

    Raises:
        CertificateError: the artefact does not do what the live model does.
    """
    path = Path(artefact)
    reference = reference_of(model, prompts, kind, tokenizer)
    certificate = compare_afresh(path, replace(reference, base=str(base or "")))
    if not certificate.passed:
        raise CertificateError(_verdict(path, certificate))
    return certificate


def compare_afresh(path: Path, reference: Reference) -> Certificate:
    """Compare in a fresh process, and leave certificate and reference in the artefact."""
    with warnings.catch_warnings():  # what is to be said of its base was said when it was loaded
        warnings.simplefilter("ignore", BaseMismatchWarning)
        certificate = _in_fresh_process(path, reference)
    reference.smaller(KEPT).save(path / REFERENCE)
    digest = _sha256(path / REFERENCE)
    folder.update_record(path, certificate={**certificate.to_json(), "reference": digest})
    return certificate


def verify(artefact: str | Path) -> Certificate:
    """Check every file's digest, reload in a fresh process, compare with the stored reference.

    What of the base is not as it was in training, such as its chat template, which no comparison
    of token ids can see, is a BaseMismatchWarning.

    Raises:
        AdapterFileError: there is no artefact with a certificate at this place.
        CertificateError: it is not, or does not do, what was certified.
    """
    path = Path(artefact)
    if not (path / RECORD).is_file():
        raise AdapterFileError(f"{path} has no {RECORD}; only what loralab wrote can be verified")
    record = read_json(path / RECORD)
    stored = record.get("certificate")
    if not isinstance(stored, Mapping):
        raise AdapterFileError(f"{path} has no certificate; it was never compared with a model")
    with _as_difference(path):
        changed = _changed_files(path, record)
        if changed:
            raise CertificateError(f"{path}: changed since it was certified: {some(changed)}")
        reference = replace(Reference.read(path / REFERENCE), device=_device_of(stored))
        certificate = _in_fresh_process(path, reference)
    if not certificate.passed:
        raise CertificateError(_verdict(path, certificate))
    return certificate


def _device_of(certificate: Mapping[str, Any]) -> str:
    """The kind of device that was certified on, if there is one here, else the processor."""
    here = device_here().type
    return here if certificate.get("device") == here else "cpu"


def file_digests(path: Path) -> dict[str, str]:
    """sha256 of every file of a model folder but the record and the reference."""
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    return {name: _sha256(path / name) for name in names if name not in (RECORD, REFERENCE)}


def _changed_files(path: Path, record: Mapping[str, Any]) -> list[str]:
    changed = []
    if record["certificate"].get("reference") != _sha256(path / REFERENCE):
        changed.append(REFERENCE)
    if "files" in record:
        now = file_digests(path)
        files: Mapping[str, str] = record["files"]
        if not isinstance(files, Mapping):
            raise CertificateError(f"{path / RECORD}: files must be an object")
        changed += [n for n in sorted({*now, *files}) if now.get(n) != files.get(n)]
    else:
        folder.read(path)  # compares the content digest
    return changed


@contextmanager
def _as_difference(path: Path) -> Iterator[None]:
    """What can no longer be read is no longer what was certified."""
    try:
        yield
    except CertificateError:
        raise
    except (LoralabError, OSError) as error:
        raise CertificateError(f"{path} is no longer what was certified: {error}") from None


def _in_fresh_process(path: Path, reference: Reference) -> Certificate:
    with atomic.explained("a temporary folder ($TMPDIR says where)"):
        temporary = tempfile.TemporaryDirectory()
    with temporary as place:
        request, answer = Path(place) / "reference.safetensors", Path(place) / "answer.json"
        reference.save(request)
        command = [sys.executable, "-m", __name__]
        command += [str(path), str(request), str(answer), reference.device, reference.base]
        # as many threads as here: sums in another order would differ in the last bit
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment = {**os.environ, **registry.environment(), **threads}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if not answer.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise CertificateError(f"{path} cannot be loaded in a fresh process: {lines[-1]}")
        return _read_answer(answer)


def _read_answer(file: Path) -> Certificate:
    """The certificate that the fresh process has written; its warnings are ours."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for text in found["warnings"]:
        warnings.warn(text, BaseMismatchWarning, stacklevel=3)
    return Certificate(**found["certificate"])


def _reload(path: Path, device: str) -> tuple[Base, str]:
    """An artefact as a model on a device, and its precision."""
    if (path / gguf_adapter.FILE).is_file():
        with tempfile.TemporaryDirectory() as place:
            live = bring_to_life(_unpacked(path, Path(place) / "adapter"), device=device)
        return live.base, live.precision
    if (path / folder.CONFIG).is_file():
        live = bring_to_life(path, device=device)
        return live.base, live.precision
    record = read_json(path / RECORD)
    precision = record["precision"]
    kind = record["base"]["kind"]
    base = models.load(str(path), kind=kind, dtype=models.parse_dtype(precision))
    base.model.to(device)
    return base, precision


def _unpacked(path: Path, place: Path) -> Path:
    """The folder with a GGUF adapter as an adapter folder."""
    kept = ("base", "task", "training", "tokenizer", "sample")
    record = {key: value for key, value in read_json(path / RECORD).items() if key in kept}
    config = models.configuration(record["base"]["name"])
    return folder.write(place, *gguf_adapter.read(path / gguf_adapter.FILE, config), record)


def _kl(p_log: Tensor, q_log: Tensor) -> float:
    """Mean KL(p || q) in nats; what is not listed counts as one more outcome."""
    listed = (p_log.exp() * (p_log - q_log)).sum(dim=1)
    p_rest = (1 - p_log.exp().sum(dim=1)).clamp_min(0)
    q_rest = (1 - q_log.exp().sum(dim=1)).clamp_min(0)
    both = (p_rest > 1e-12) & (q_rest > 1e-12)
    rest = torch.where(both, p_rest * (p_rest.clamp_min(1e-12) / q_rest.clamp_min(1e-12)).log(), 0)
    return float((listed + rest).mean().clamp_min(0))


def _verdict(path: Path, found: Certificate) -> str:
    return (
        f"{path} does not do what was certified: relative logit difference "
        f"{found.relative_difference:.2e}, mean KL {found.mean_kl:.2e}, top-1 agreement "
        f"{found.top1_agreement:.3f}; allowed for {found.precision}: {found.tolerance}"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _main(path: str, request: str, answer: str, device: str, base: str = "") -> None:
    """The fresh process: reload, compute, compare, write the verdict."""
    reference = replace(Reference.read(Path(request)), base=base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BaseMismatchWarning)
        try:
            certificate = _compared(Path(path), reference, device)
        except torch.OutOfMemoryError:  # the live model still fills the accelerator
            certificate = _compared(Path(path), reference, "cpu")
    said = [str(w.message) for w in caught if issubclass(w.category, BaseMismatchWarning)]
    content = {"certificate": certificate.to_json(), "warnings": list(dict.fromkeys(said))}
    atomic.write_file(answer, json.dumps(content))


def _compared(path: Path, reference: Reference, device: str) -> Certificate:
    if reference.base:
        live = on_base(path, reference.base, device=device)
        base, precision = live.base, live.precision
    else:
        base, precision = _reload(path, device)
    logits = logits_of(base.model, reference.prompts, base.kind, base.tokenizer)
    return compare(reference, logits, precision, device)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except LoralabError as failure:
        sys.exit(str(failure))
