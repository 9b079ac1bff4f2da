"""Device and precision of this machine."""

import torch


def device_here() -> torch.device:
    """Return the accelerator if there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """Return what "auto" means on this machine: bf16 where the hardware multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        # emulated bf16 is slower than fp32
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    abilities = torch.cpu.get_capabilities()
    return "bf16" if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else "fp32"
