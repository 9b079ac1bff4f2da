"""Speed and peak memory of training steps: loralab against peft with Trainer, and against trl.

All train LoRA r=8 on every linear layer of SmolLM2-135M, on the same token ids and labels, batch
8, with their own loop, data loader and defaults as documented: ours as `loralab.train` does it;
Trainer with bf16=True, rows at random or grouped by length; trl's SFTTrainer with packing, two rows
of 512 tokens a step (only where trl is installed). Texts: "mixed" are log-normal with median 90, at
most 512 tokens, loss on the last 40 % of each; "short" are of about 40 tokens. Throughput counts
real tokens, never padding. The first steps warm up and are not counted.

    python benchmarks/train_step.py [--peer trainer grouped packed] [--texts mixed short]
        [--pairs 6] [--preload libtcmalloc_minimal.so.4] [--json FILE]
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sides import TEXTS, Figures, Turn, Worker, answering, in_turn, parser, ratios, report, shown, spread, write_rows

ROWS, BATCH, LONGEST, WARM_UP = 400, 8, 512, 3
PEERS = {
    "trainer": "peft + Trainer",
    "grouped": "peft + Trainer, grouped by length",
    "packed": "peft + trl, packed 2 x 512",
}


def ours(data: Path, steps: int, turn: Turn) -> None:
    """loralab's own training run."""
    import loralab

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            turn({"tokens": event["tokens"]})

    loralab.train(
        model="smollm2-135m",
        data=str(data),
        output_dir=data.parent / "ours",
        listener=listen,
        training=loralab.Training(
            max_steps=steps, batch_size=BATCH, max_length=LONGEST, save_every=10_000, evaluation_rows=1
        ),
    )


def encoded(data: Path) -> tuple[Any, list[dict[str, list[int]]]]:
    """The model in fp32, and the rows as loralab encodes them."""
    from loralab.models.load import load
    from loralab.tasks import catalog, encode

    base = load("smollm2-135m", kind="causal-lm")
    task = catalog.find(str(data))
    found = encode.encode(task, "train", base.tokenizer, kind=base.kind, max_length=LONGEST)
    return base, [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in found.examples]


def peer(name: str, data: Path, steps: int, turn: Turn) -> None:
    """peft with Trainer or trl's SFTTrainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    base, rows = encoded(data)
    seen = {"tokens": 0}

    class Step(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn({"tokens": seen["tokens"]})

    class Collate(DataCollatorForSeq2Seq):
        def __call__(self, features: list[dict[str, Any]], return_tensors: Any = None) -> Any:
            seen["tokens"] += sum(len(feature["input_ids"]) for feature in features)
            return super().__call__(features, return_tensors)

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    common: dict[str, Any] = {
        "output_dir": str(data.parent / "peer"),
        "max_steps": steps,
        "learning_rate": 5e-4,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    if name == "packed":
        _packed(base, rows, lora, common, seen, Step)
        return
    if name == "grouped":
        common["train_sampling_strategy"] = "group_by_length"
    Trainer(
        model=get_peft_model(base.model, lora),
        train_dataset=rows,
        callbacks=[Step()],
        args=TrainingArguments(per_device_train_batch_size=BATCH, **common),
        data_collator=Collate(base.tokenizer, padding=True, label_pad_token_id=-100),
    ).train()


def _packed(base: Any, rows: Sequence[Any], lora: Any, common: dict[str, Any], seen: Figures, step: Any) -> None:
    """Best-fit packing into rows of LONGEST tokens, two a step: as many tokens as eight rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        packing=True,
        max_length=LONGEST,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        num_train_epochs=100,
        **common,
    )
    trainer = SFTTrainer(
        model=base.model,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        peft_config=lora,
        processing_class=base.tokenizer,
        callbacks=[step()],
    )
    inner = trainer.data_collator

    def collate(features: list[dict[str, Any]]) -> Any:
        seen["tokens"] += sum(len(feature["input_ids"]) for feature in features)
        return inner(features)

    trainer.data_collator = collate
    trainer.train()


def measure(name: str, texts: str, pairs: int, preload: str) -> dict[str, Any]:
    """Ours and one peer, step by step in turn."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, texts, ROWS)
        steps = pairs + WARM_UP + 1

        def worker(side: str, library: str = "") -> Worker:
            return Worker(__file__, ["--worker", side, str(data), str(steps)], library)

        sides = {"loralab": lambda: worker("loralab"), name: lambda: worker(name, preload)}
        counted = in_turn(sides, pairs, WARM_UP)
    speed = {side: [r["tokens"] / r["seconds"] for r in rows] for side, rows in counted.items()}
    peak = {side: max(r["peak"] for r in rows) for side, rows in counted.items()}
    return {
        "peer": name,
        "texts": texts,
        "preload": Path(preload).name,
        "pairs": pairs,
        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
        "speed_ratio": ratios(speed["loralab"], speed[name]),
        # all counted tokens over all counted seconds: steps of one side are not the other's
        "total_ratio": _overall(counted["loralab"]) / _overall(counted[name]),
        "peak_bytes": peak,
        "memory_ratio": peak["loralab"] / peak[name],
    }


def _overall(rows: Sequence[Figures]) -> float:
    return sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows)


def main() -> None:
    options = parser(__doc__)
    installed = [p for p in PEERS if p != "packed" or importlib.util.find_spec("trl")]
    options.add_argument("--peer", nargs="+", choices=[*PEERS], default=installed)
    options.add_argument("--texts", nargs="+", choices=[*TEXTS], default=[*TEXTS])
    options.add_argument("--pairs", type=int, default=6, help="counted steps of each side")
    options.add_argument("--preload", default="", help="allocator library for the peer")
    options.add_argument("--worker", nargs=3, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        side, data, steps = chosen.worker
        if side == "loralab":
            ours(Path(data), int(steps), answering())
        else:
            peer(side, Path(data), int(steps), answering())
        return
    found = [measure(name, texts, chosen.pairs, chosen.preload) for texts in chosen.texts for name in chosen.peer]
    rows = [
        {
            "texts": r["texts"],
            "peer": PEERS[r["peer"]] + (" + allocator" if r["preload"] else ""),
            "loralab, tokens/s": shown(r["tokens_per_second"]["loralab"], 0),
            "peer, tokens/s": shown(r["tokens_per_second"][r["peer"]], 0),
            "ratio of pairs": shown(r["speed_ratio"]),
            "ratio of totals": f"{r['total_ratio']:.2f}",
            "peak GB": f"{r['peak_bytes']['loralab'] / 1e9:.2f} : {r['peak_bytes'][r['peer']] / 1e9:.2f}",
            "ratio": f"{r['memory_ratio']:.2f}",
        }
        for r in found
    ]
    report(f"Training steps, SmolLM2-135M, LoRA r=8, batch {BATCH}, {chosen.pairs} pairs", rows, found, chosen.json)


if __name__ == "__main__":
    main()
