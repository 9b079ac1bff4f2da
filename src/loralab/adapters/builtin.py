"""The methods of this package, registered as any other is.

Their functions are imported when they are called: the command line reads this file and must not
load torch.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from loralab.adapters.methods import IA3, AdaLoRA, BitFit, Bottleneck, FullFineTune, LinearProbe, LoRA, Prefix, Prompt
from loralab.adapters.registry import MethodSpec


def _late(module: str, name: str) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        return getattr(import_module(f"loralab.adapters.{module}"), name)(*given)

    return call


def _in_file(module: str, build: str = "build") -> dict[str, Any]:
    """Return the three functions of a method's own file."""
    return {
        "build_all": _late(module, build),
        "fields_all": _late(module, "fields"),
        "parse_all": _late(module, "parse"),
    }


BUILT_IN = (
    MethodSpec(
        config=LoRA,
        name="lora",
        peft_type="LORA",
        in_peft=True,
        low_rank=True,
        learning_rate=5e-4,
        sizes=("rank",),
        targets=_late("lora", "selected_modules"),
        rate_ratio=_late("lora", "rate_ratio"),
        **_in_file("lora"),
        variants={
            "dora": {"dora": True},
            "rslora": {"scaling": "alpha/sqrt(r)"},
            "lora+": {"lora_plus": 16.0},
            "pissa": {"init": "pissa"},
            "qlora": {"quantize": "nf4"},
        },
    ),
    MethodSpec(
        config=AdaLoRA,
        name="adalora",
        peft_type="ADALORA",
        in_peft=True,
        learning_rate=2e-3,
        sizes=("rank",),
        budget=_late("budget", "RankBudget"),
        scales_gradients=False,
        **_in_file("adalora"),
    ),
    MethodSpec(
        config=Bottleneck,
        name="bottleneck",
        peft_type="BOTTLENECK",
        merges=False,
        learning_rate=1e-3,
        sizes=("width",),
        **_in_file("bottleneck"),
        variants={
            "houlsby": {"placement": "houlsby"},
            "pfeiffer": {"placement": "pfeiffer"},
            "parallel": {"placement": "parallel", "factor": 4.0},
        },
    ),
    MethodSpec(
        config=Prefix,
        name="prefix",
        peft_type="PREFIX_TUNING",
        in_peft=True,
        merges=False,
        learning_rate=1e-2,
        sizes=("tokens",),
        prefix="base_model.",
        pack=_late("prefix", "pack"),
        hooks=_late("prefix", "register_hooks"),
        prefix_kv=_late("prefix", "prefix_kv"),
        **_in_file("prefix"),
        variants={"prefix-mlp": {"mlp": True}},
    ),
    MethodSpec(
        config=Prompt,
        name="prompt",
        peft_type="PROMPT_TUNING",
        in_peft=True,
        merges=False,
        learning_rate=3e-2,
        sizes=("tokens",),
        prefix="base_model.",
        own_pass=True,
        pack=_late("prompt", "pack"),
        hooks=_late("prompt", "register_hooks"),
        prefix_kv=_late("prompt", "prefix_kv"),
        **_in_file("prompt"),
    ),
    MethodSpec(config=IA3, name="ia3", peft_type="IA3", in_peft=True, learning_rate=1e-2, **_in_file("ia3")),
    MethodSpec(
        config=BitFit,
        name="bitfit",
        peft_type="BITFIT",
        learning_rate=3e-3,
        trains_base=True,
        **_in_file("subset", "biases"),
    ),
    MethodSpec(
        config=FullFineTune,
        name="full",
        peft_type="FULL",
        learning_rate=5e-5,
        trains_base=True,
        cannot_serve="trains every weight of the model; merge it, and serve it as a base of its own",
        **_in_file("subset", "everything"),
    ),
    MethodSpec(
        config=LinearProbe,
        name="linear-probe",
        peft_type="LINEAR_PROBE",
        learning_rate=3e-3,
        complete=_late("subset", "with_head"),
        **_in_file("subset", "probe"),
    ),
)
