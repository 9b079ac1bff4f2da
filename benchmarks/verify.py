"""Merges by peft in every dtype, each proven; faults planted into them, each found and named.

Tiny random models, saved, adapted, merged and saved again by peft and transformers alone; what is
verified is the folder; of a third of them logits too. Faults are put into the tensors of an honest merge.
`--big LAYERS` writes a folder with the widths of an 8B model and so many of its 32 layers instead, and
verifies it in a process of its own: processor seconds, and the largest resident size.

    python benchmarks/verify.py [--big LAYERS] [--json FILE]
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sides import finish, parser, table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import loralab

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "tied": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
}
EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings"}
OPTIONS = {
    "llama": ["plain", "rslora", "patterns", "dora", "embedding", "head", "saved head", "tokens", "ia3", "adalora"],
    "tied": ["plain", "embedding", "head", "saved head", "saved embedding", "tokens"],
    "gpt2": ["plain", "dora", "embedding", "ia3"],
    "bert": ["plain", "dora", "bias of B", "all biases"],
}
# stored, loaded in, saved in
COURSES = [("fp32",) * 3, ("bf16",) * 3, ("fp16",) * 3, ("bf16", "fp32", "bf16"), ("fp32", "bf16", "fp32")]
WAYS = ("peft", "safe_merge", "adapter in the base's dtype")
FAULTED = [("llama", "fp32"), ("llama", "bf16"), ("gpt2", "fp16"), ("bert", "bf16"), ("tied", "fp32")]
FACTORS = {
    "twice": 2,
    "subtracted": -1,
    "alpha / sqrt(r) for alpha / r": math.sqrt(8),
    "alpha / r for alpha / sqrt(r)": 1 / math.sqrt(8),
    "left out": 1 / 1.5,
    "1 % too much": 1.01,
    "a tenth too little": 0.9,
    "half": 0.5,
    "not divided by r": 8,
}
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
Fault = tuple[str, str, Callable[[Tensors], Any]]


def new_model(name: str) -> Any:
    torch.manual_seed(1)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=120, n_positions=64))
    if name == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=120, num_labels=3))
    own = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=120, tie_word_embeddings=name == "tied")
    return LlamaForCausalLM(own)


def peft_config(name: str, option: str) -> Any:
    targets, embedding = TARGETS[name], EMBEDDINGS.get(name, "embed_tokens")
    kind = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    if option == "ia3":
        return IA3Config(task_type=kind, target_modules=targets, feedforward_modules=targets[-1:])
    if option == "adalora":
        return AdaLoraConfig(task_type=kind, target_modules=targets, init_r=8, target_r=4, total_step=9)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {targets[0]: 4}, "alpha_pattern": {targets[-1]: 3}},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": [*targets, embedding]},
        "head": {"target_modules": [*targets, "lm_head"]},
        "saved head": {"modules_to_save": ["lm_head"]},
        "saved embedding": {"modules_to_save": [embedding]},
        "tokens": {"trainable_token_indices": {embedding: [3, 7, 100]}},
        "bias of B": {"lora_bias": True},
        "all biases": {"bias": "all"},
    }
    return LoraConfig(task_type=kind, **{"r": 8, "lora_alpha": 12, "target_modules": targets, **options[option]})


def opened(name: str, folder: Path, dtype: str) -> Any:
    if name == "bert":
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype], num_labels=3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


def base_of(root: Path, name: str, dtype: str) -> Path:
    folder = root / f"base-{name}-{dtype}"
    if not folder.exists():
        new_model(name).to(DTYPES[dtype]).save_pretrained(folder)
    return folder


@torch.no_grad()
def adapter_of(root: Path, name: str, option: str, dtype: str, seed: int = 5) -> Path:
    folder = root / f"adapter-{name}-{option}-{dtype}-{seed}"
    if not folder.exists():
        model = get_peft_model(opened(name, base_of(root, name, dtype), dtype), peft_config(name, option))
        torch.manual_seed(seed)
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.03 * torch.randn_like(parameter)
                parameter.add_(noise * parameter if "magnitude" in path else noise)
        model.save_pretrained(folder)
    return folder


def merged(root: Path, name: str, option: str, course: tuple[str, ...], way: str) -> Path:
    """Merge into a folder that is overwritten by the next one."""
    stored, load, save = course
    base, adapter = base_of(root, name, stored), adapter_of(root, name, option, stored)
    cast = way != WAYS[2]
    model = PeftModel.from_pretrained(opened(name, base, load), adapter, autocast_adapter_dtype=cast)
    place = root / "merged"
    shutil.rmtree(place, ignore_errors=True)
    model.merge_and_unload(safe_merge=way == "safe_merge").to(DTYPES[save]).save_pretrained(place)
    return place


def honest(root: Path) -> dict[str, Any]:
    """Verify merges of every option, dtype and way to merge; return the false alarms by name."""
    counted: Counter[str] = Counter()
    alarms, orders = [], Counter[str]()
    for name, options in OPTIONS.items():
        for option in options:
            for course in COURSES:
                for way in WAYS:
                    place = merged(root, name, option, course, way)
                    base, adapter = base_of(root, name, course[0]), adapter_of(root, name, option, course[0])
                    report = loralab.verify(place, base=base, adapter=adapter, logits=way == "peft")
                    counted[f"{name}: {option}"] += 1
                    orders.update(report.orders)
                    if not report.passed:
                        alarms.append([name, option, *course, way, report.causes])
    return {"merges": dict(counted), "total": counted.total(), "false alarms": alarms, "orders": dict(orders)}


def faults(base: Tensors, adapter: Tensors, other: Tensors, turned: bool) -> Iterator[Fault]:
    """Yield the name of a fault, the cause that must be named, and what is done to the tensors."""
    keys = [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")]
    paths = [key.removeprefix(PREFIX) for key in keys]

    def delta(path: str, tensors: Tensors = adapter) -> Tensor:
        A, B = (tensors[f"{PREFIX}{path}.lora_{part}.weight"].float() for part in "AB")
        return 1.5 * ((B @ A).T if turned else B @ A)

    def again(factor: float, only: list[str] = paths, update: Callable[[str], Tensor] = delta) -> Callable[..., None]:
        def edit(tensors: Tensors) -> None:
            for path in only:
                key = f"{path}.weight"
                tensors[key] = (base[key].float() + factor * update(path)).to(tensors[key].dtype)

        return edit

    yield "update missing everywhere", "update_missing", again(0)
    yield "update missing in one layer", "update_missing", again(0, paths[:1])
    for words, factor in FACTORS.items():
        yield f"scale: {words}", "scaled", again(factor)
    yield "scale of one layer", "scaled", again(1.5, paths[-1:])
    yield "another adapter", "other_adapter", again(1, paths, lambda path: delta(path, other))
    square = [path for path in paths if len(set(base[f"{path}.weight"].shape)) == 1]
    if square:
        yield "update transposed", "transposed", again(1, square, lambda path: delta(path).T)
        key = f"{square[0]}.weight"
        yield "weight transposed", "transposed", lambda t: t.update({key: t[key].T})
    same = [path for path in paths if base[f"{path}.weight"].shape == base[f"{paths[0]}.weight"].shape][:2]
    one, two = (f"{path}.weight" for path in same)
    yield "layers swapped", "layer_swapped", lambda t: t.update({one: t[two], two: t[one]})
    yield "updates swapped", "layer_swapped", again(1, same, lambda path: delta(same[path == same[0]]))
    vocabulary = next(key for key in base if key.split(".")[-2] in ("embed_tokens", "wte", "word_embeddings"))
    yield "truncated vocabulary", "truncated_vocabulary", lambda t: t.update({vocabulary: t[vocabulary][:-7]})
    norm = next(key for key in base if "norm" in key.lower() or "ln_" in key)
    yield "a norm changed", "changed", lambda t: t.update({norm: t[norm] + 0.02})
    yield "a norm lost", "missing_tensor", lambda t: t.pop(norm)
    yield "one number changed", "changed", lambda t: t[one].view(-1)[17].add_(0.05)
    yield "a number is NaN", "not_finite", lambda t: t[one].view(-1)[17].fill_(math.nan)
    yield "not merged at all", "not_merged", lambda t: (again(0)(t), t.update(adapter))

    def noisy(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            tensors[key] = (tensor.float() + 0.01 * torch.randn(tensor.shape)).to(tensor.dtype)

    yield "another base", "other_base", noisy


def planted(root: Path) -> dict[str, Any]:
    """Verify every fault in merges of several models and dtypes; return those that passed or were misnamed."""
    counted: Counter[str] = Counter()
    missed, misnamed = [], []
    for name, dtype in FAULTED:
        place = merged(root, name, "plain", (dtype,) * 3, "peft")
        base, adapter = base_of(root, name, dtype), adapter_of(root, name, "plain", dtype)
        whole = load_file(base / "model.safetensors")
        tensors = [
            load_file(adapter_of(root, name, "plain", dtype, seed) / "adapter_model.safetensors") for seed in (5, 9)
        ]
        for fault, cause, edit in faults(whole, *tensors, name == "gpt2"):
            own = {key: tensor.clone() for key, tensor in load_file(place / "model.safetensors").items()}
            edit(own)
            broken = root / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(place, broken)
            own = {key: tensor.clone().contiguous() for key, tensor in own.items()}
            save_file(own, broken / "model.safetensors", {"format": "pt"})
            report = loralab.verify(broken, base=base, adapter=adapter, logits=False)
            counted[fault] += 1
            if report.passed or not report.decided:
                missed.append([name, dtype, fault])
            elif next(iter(report.causes)) != cause:
                misnamed.append([name, dtype, fault, report.causes])
    return {"faults": dict(counted), "total": counted.total(), "missed": missed, "misnamed": misnamed}


def write_big(root: Path, layers: int) -> int:
    """Write base, adapter and merge with the widths of an 8B model, in bf16; return their number of weights."""
    hidden, inner, vocabulary, rank = 4096, 14336, 128256, 16
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, hidden))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)) | {"mlp.down_proj": (hidden, inner)}
    noise = (0.02 * torch.randn(1 << 22)).bfloat16()
    index: dict[str, str] = {}
    adapter: Tensors = {}

    def drawn(rows: int, columns: int) -> Tensor:
        return noise.repeat(-(-rows * columns // len(noise)))[: rows * columns].view(rows, columns)

    def put(number: int, base: Tensors, whole: Tensors) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        index.update(dict.fromkeys(base, file))
        for place, tensors in (("base", base), ("merged", whole)):
            save_file(tensors, root / place / file)

    for place in ("base", "merged", "adapter"):
        (root / place).mkdir()
    count = 2 * vocabulary * hidden
    for layer in range(layers):
        base, whole = {}, {}
        for path, (rows, columns) in shapes.items():
            key = f"model.layers.{layer}.{path}"
            A, B = 0.01 * torch.randn(rank, columns), 0.01 * torch.randn(rows, rank)
            adapter |= {f"{PREFIX}{key}.lora_A.weight": A, f"{PREFIX}{key}.lora_B.weight": B}
            base[f"{key}.weight"] = drawn(rows, columns)
            whole[f"{key}.weight"] = (base[f"{key}.weight"].float() + 2 * (B @ A)).bfloat16()
            count += rows * columns
        put(layer + 1, base, whole)
    ends = {"model.embed_tokens.weight": drawn(vocabulary, hidden), "lm_head.weight": drawn(vocabulary, hidden).clone()}
    put(layers + 1, ends, ends)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    for place in ("base", "merged"):
        (root / place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (root / place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    save_file(adapter, root / "adapter" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return count


def big(layers: int) -> dict[str, Any]:
    """Verify a large folder in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        numbers = write_big(Path(name), layers)
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"layers": layers, "numbers": numbers, **json.loads(done.stdout.splitlines()[-1])}


def child(root: Path) -> None:
    started = time.perf_counter(), time.process_time()
    report = loralab.verify(root / "merged", base=root / "base", adapter=root / "adapter", logits=False)
    ended = time.perf_counter(), time.process_time()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    # getrusage would count what the parent held when this process was started
    peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    seconds, processor_seconds = (end - start for start, end in zip(started, ended, strict=True))
    figures = {"seconds": seconds, "processor_seconds": processor_seconds, "peak": peak}
    print(json.dumps({"passed": report.passed, "counts": report.counts, **figures}))


def tiny() -> tuple[str, dict[str, Any]]:
    """Verify honest and faulty merges of tiny models; return the tables and the figures."""
    warnings.simplefilter("ignore")  # peft's, of ties and of Conv1D
    with tempfile.TemporaryDirectory() as name:
        own, theirs = honest(Path(name)), planted(Path(name))
    alarms, missed, misnamed = own["false alarms"], theirs["missed"], theirs["misnamed"]
    text = [
        table("Honest merges", ("adapter", "merges"), list(own["merges"].items())),
        f"{own['total']} merges, {len(alarms)} false alarms {alarms or ''}\n",
        table("Planted faults", ("fault", "times"), list(theirs["faults"].items())),
        f"{theirs['total']} faults, {len(missed)} missed {missed or ''}, {len(misnamed)} misnamed {misnamed or ''}",
    ]
    return "\n".join(text), {"honest": own, "planted": theirs}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--big", type=int, default=0, help="layers of a large folder; tiny models without it")
    options.add_argument("--child", type=Path, help="verify what --big has written here")
    given = options.parse_args()
    if given.child:
        child(given.child)
    elif given.big:
        found = {"big": big(given.big)}
        finish(str(found), found, given.json)
    else:
        finish(*tiny(), given.json)


if __name__ == "__main__":
    main()
