"""Speed on a GPU against peers in turn: training steps, QLoRA, decoding; what parts of gpu.py run."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import SHAPES, fill, language_model, ragged, tokenizer, trained
from sides import Figures, Turn, Worker, in_turn, ratios, spread, write_rows

PEERS = {"trainer": "peft + Trainer", "liger": "peft + Trainer + liger"}
BATCH, LONGEST, ROWS = 8, 512, 400
GPU = str(Path(__file__).with_name("gpu.py"))
Line = dict[str, Any]


def train_shape(shape: str, pairs: int, warm_up: int, quantize: str = "none") -> Iterator[Line]:
    """Steps of loralab and of each peer in turn, on rows of mixed length."""
    liger = importlib.util.find_spec("liger_kernel") is not None and quantize == "none"
    rate = matrix_rate(torch.device("cuda")) if torch.cuda.is_available() else None
    for name in PEERS if liger else ("trainer",):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            write_rows(data, "mixed", ROWS)
            given = [shape, str(data), str(pairs + warm_up + 1), quantize]
            sides = {side: partial(Worker, GPU, ["--worker", side, *given]) for side in ("loralab", name)}
            line = summed_up(in_turn(sides, pairs, warm_up), name)
            yield line | {"precision": quantize, "share_of_rate": share(line, shape, rate)}


def profiled(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Kernels and times of a step of two shapes, by each path."""
    from loralab import LoRA, attach
    from loralab.training.fast.forward_path import MODES, fastest_path

    for shape in ("tiny",) if tiny else ("135m", "1b"):
        model = language_model(shape, torch.bfloat16, device)
        adapter = attach(model, LoRA(rank=8), generator=torch.Generator().manual_seed(0))
        fill(adapter)
        path = fastest_path(adapter, "causal-lm", pad_id=2)
        graphs = path.graphs
        for way in (*reversed(MODES), *["graphed"] * (graphs is not None)):
            path.mode = "packed" if way == "graphed" else way
            path.graphs = graphs if way == "graphed" else None
            step = partial(gradient_step, path, adapter, ragged(model, tiny))
            yield {"ok": True, "case": f"{shape}, {way}", "precision": "bf16"} | profiled_step(step, device)


def gradient_step(path: Any, adapter: Any, rows: Sequence[Any]) -> None:
    """Compute loss and gradient of some rows."""
    from loralab.training.fast.forward_path import gradient_of

    with path.activated():
        gradient_of(path.loss(rows), adapter)


def profiled_step(step: Callable[[], None], device: torch.device, times: int = 5) -> Line:
    """Return a step's kernels, and milliseconds until all are launched and until they are done."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(3):
        step()
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        step()
    launched = time.perf_counter() - begun
    wait()
    done = time.perf_counter() - begun
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        step()
        wait()
    kernels = sum(e.count for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    own = {"launched_milliseconds": 1e3 * launched / times, "milliseconds": 1e3 * done / times}
    return own | {"kernels": kernels}


def matrix_rate(device: torch.device, size: int = 8192, times: int = 20) -> float:
    """Return the operations a second of a square bf16 product."""
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        x @ x
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - begun)


def share(line: Line, shape: str, rate: float | None) -> float | None:
    """Return the part of the machine's rate that the layers' own products take; attention and head not counted."""
    hidden, inner, layers, heads, keys, _ = SHAPES[shape]
    weights = layers * (2 * hidden * hidden * (1 + keys / heads) + 3 * hidden * inner)
    speed: float = line["tokens_per_second"]["loralab"]["median"]
    return None if rate is None else 4 * weights * speed / rate  # forward, and the gradient of the input


def summed_up(counted: Mapping[str, list[Figures]], peer_name: str) -> Line:
    """Ratios of the pairs, and the peaks."""
    speed = {side: [r["tokens"] / r["seconds"] for r in rows] for side, rows in counted.items()}
    peak = {side: max(r["peak"] for r in rows) for side, rows in counted.items()}
    return {
        "ok": True,
        "case": peer_name,
        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
        "speed_ratio": ratios(speed["loralab"], speed[peer_name]),
        "peak_bytes": peak,
        "memory_ratio": peak["loralab"] / peak[peer_name],
    }


def step_in_turn(side: str, shape: str, data: Path, steps: int, quantize: str, turn: Turn) -> None:
    """In a worker: train with loralab or a peer, and call `turn` after each step."""
    from loralab import LoRA, Training

    if side == "loralab":

        def listen(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                turn({"tokens": event["tokens"]})

        precision = "bf16" if torch.cuda.is_available() else "fp32"
        trained(
            shape,
            LoRA(),
            data,
            data.parent / "ours",
            listen,
            Training(
                max_steps=steps,
                batch_size=BATCH,
                max_length=LONGEST,
                save_every=10_000,
                evaluation_rows=1,
                precision=precision,
                quantize=quantize,
            ),
        )
    else:
        peer(side, shape, data, steps, quantize, turn)


def peer(name: str, shape: str, data: Path, steps: int, quantize: str, turn: Turn) -> None:
    """peft with Trainer on the same rows and weights, with liger's kernels or bitsandbytes' layers where asked for."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from loralab.models.device import device_here
    from loralab.tasks import catalog, encode

    cuda, words = torch.cuda.is_available(), tokenizer()
    dtype = torch.bfloat16 if cuda else torch.float32
    task = catalog.find(str(data))
    found = encode.encode(task, "train", words, kind="causal-lm", max_length=LONGEST)
    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in found.examples]
    seen = {"tokens": 0.0}

    class Step(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn(dict(seen))

    class Collate(DataCollatorForSeq2Seq):  # type: ignore[misc]
        def __call__(self, features: list[dict[str, Any]], return_tensors: Any = None) -> Any:
            seen["tokens"] += sum(len(feature["input_ids"]) for feature in features)
            return super().__call__(features, return_tensors)

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = language_model(shape, dtype, device_here())
    if quantize == "nf4":
        base = in_nf4(base)
    model = get_peft_model(base, lora)
    arguments = TrainingArguments(
        output_dir=str(data.parent / "peer"),
        max_steps=steps,
        learning_rate=5e-4,
        bf16=cuda,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        per_device_train_batch_size=BATCH,
        use_liger_kernel=name == "liger",
    )
    Trainer(
        model=model,
        train_dataset=rows,
        callbacks=[Step()],
        args=arguments,
        data_collator=Collate(words, padding=True, label_pad_token_id=-100),
    ).train()


def in_nf4(model: Any) -> Any:
    """The model with bitsandbytes' own layers, as transformers loads one for QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            new = Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype
            )
            weight, device = layer.weight.detach().cpu(), layer.weight.device
            new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            new.bias = layer.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new.to(device))
    model.is_loaded_in_4bit = True  # by which peft knows them
    return model


def decoding(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Tokens a second of ten adapters in one batch, loralab's engine and peft's generate in turn."""
    from serve import Side, compared, write_adapters

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = language_model("tiny" if tiny else "135m", torch.bfloat16, device)
        if tiny:
            model.resize_token_embeddings(40_000)  # of which the prompts are drawn
        model.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        write_adapters(model, folder / "store")
        del model
        sides = {name: Side(name, folder) for name in ("ours", "peft")}
        try:
            for batch in (2,) if tiny else (1, 8, 32, 128):
                for (rows, mode), speed in compared(sides, [batch], 1 if tiny else 3).items():
                    yield {
                        "ok": True,
                        "case": f"{rows} rows, {mode}",
                        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
                        "speed_ratio": ratios(speed["ours"], speed["peft"]),
                    }
        finally:
            for side in sides.values():
                side.close()
