"""What an adapter can be turned into, each with its certificate."""

from collections.abc import Callable
from pathlib import Path

from loralab import atomic
from loralab.adapters.attach import Adapter
from loralab.adapters.conv import ConvWithLoRA
from loralab.adapters.folder import CONFIG, read_json
from loralab.adapters.multihead import MultiheadAttentionWithLoRA
from loralab.adapters.recipes import OUR_OWN
from loralab.artefacts.certificate import Certificate, compare_afresh, reference_of
from loralab.artefacts.live import bring_to_life, sample_of
from loralab.artefacts.merge import merge, unproved
from loralab.errors import CertificateError, ConfigError, nearest, some

OUT_B = "base_layer.out_proj.lora_B.weight"


def export(
    adapter: str | Path,
    output: str | Path,
    *,
    to: str,
    model: str | None = None,
    precision: str | None = None,
) -> Certificate:
    """Write an adapter in another form to a new folder, and prove it in a fresh process.

    Args:
        to: "peft" (the adapter folder that peft and vLLM load) or "merged" (a full model).

    Raises:
        InputError: something given is wrong; nothing has been written.
        CertificateError: what was written does not do what the live model does.
    """
    if to not in TARGETS:
        raise ConfigError(
            f"there is no export target {to!r}, only {', '.join(TARGETS)}{nearest(to, TARGETS)}"
        )
    return TARGETS[to](Path(adapter), Path(output), model, precision)


def _to_peft(adapter: Path, output: Path, model: str | None, precision: str | None) -> Certificate:
    """peft's own files, of the methods that peft has."""
    atomic.require_free(output)
    kind = read_json(adapter / CONFIG).get("peft_type") if (adapter / CONFIG).is_file() else None
    if kind in OUR_OWN:
        raise ConfigError(f"peft has no method {kind}, so {adapter} cannot be written for it")
    live = bring_to_life(adapter, model=model, precision=precision)
    if reasons := _not_for_peft(live.adapter):
        raise ConfigError(f"peft cannot express {adapter}: {some(reasons)}")
    base = live.base
    prompts = sample_of(live.stored.record, base)
    reference = reference_of(base.model, prompts, base.kind, base.tokenizer)
    stored = live.stored.record
    record = {k: v for k, v in stored.items() if k not in ("format", "digest", "certificate")}
    record["base"] = {
        **stored.get("base", {}), "name": live.base.name, "kind": live.base.kind,
        "precision": live.precision,
    }  # fmt: skip
    with unproved(output) as rejected:
        live.adapter.save(rejected, record)
        certificate = compare_afresh(rejected, reference)
        if not certificate.passed:
            raise CertificateError(f"the exported adapter differs; it is left in {rejected}")
    return certificate


def _not_for_peft(adapter: Adapter) -> list[str]:
    """What peft would compute in another way than here."""
    reasons = []
    for name, module in adapter.modules.items():
        if isinstance(module, ConvWithLoRA) and module.base.groups > 1:
            reasons.append(f"{name} is a convolution in groups, whose A peft does not group")
        if isinstance(module, ConvWithLoRA) and set(module.base.dilation) != {1}:
            reasons.append(f"{name} is a dilated convolution, whose dilation peft forgets")
        if isinstance(module, MultiheadAttentionWithLoRA) and bool(module.tensors()[OUT_B].any()):
            reasons.append(f"{name} updates out_proj, which peft would add twice")
    return reasons


def _to_merged(
    adapter: Path, output: Path, model: str | None, precision: str | None
) -> Certificate:
    return merge(adapter, output, model=model, precision=precision)


TARGETS: dict[str, Callable[[Path, Path, str | None, str | None], Certificate]] = {
    "peft": _to_peft,
    "merged": _to_merged,
}
