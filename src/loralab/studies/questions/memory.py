"""Q7: how can memory be saved? Each saving alone, all together, and a base in 4 bits."""

from collections.abc import Sequence
from typing import Any

import torch

from loralab.errors import ConfigError, nearest
from loralab.models.device import resolve_precision
from loralab.models.load import Base
from loralab.models.quantize import gguf_file
from loralab.studies.measures.peaks import MEASURE_PEAKS
from loralab.studies.readings.savings import (
    BASELINE,
    CLOSE,
    WORDS,
    Savings,
    blanks,
    figures_of,
    findings,
    sentence,
    table,
)
from loralab.studies.study import Answer, Arm, Ground, Record, Text

__all__ = ["MEASURE", "arms", "conclude"]

MEASURE = MEASURE_PEAKS
WHOLE = 10**7  # tokens in a pass: no batch is cut
PASS = 256  # tokens in a pass, where it is cut
SHARED = ("method", "rank", "save_every")  # fields of all arms, no saving


def arms(ground: Ground, base: Base) -> list[Arm]:
    """The baseline, each saving alone, all together, and all on a base in 4 bits."""
    batch = int(ground.fields["batch_size"])
    cut, half = largest_part(batch), half_precision()
    shared = {"method": "lora", "rank": 8, "save_every": int(ground.fields["max_steps"])}
    whole: dict[str, Any] = {**shared, "precision": "fp32", "batch_size": batch, "pass_tokens": WHOLE}
    parts = {"batch_size": cut, "accumulation_steps": batch // cut}
    every = {**whole, **parts, "precision": half, "gradient_checkpointing": "on"}
    one, few = f"{batch} × 1", f"{cut} × {batch // cut}"
    known = {
        BASELINE: (f"fp32, {one}", whole),
        "accumulation": (f"fp32, {few}", {**whole, **parts}),
        "mixed": (f"{half}, {one}", {**whole, "precision": half}),
        "checkpoint": (f"fp32, {one}, checkpoint", {**whole, "gradient_checkpointing": "on"}),
        "together": (f"{half}, {few}, checkpoint", every),
        "nf4": (f"{half}, {few}, checkpoint, NF4", {**every, "quantize": "nf4"}),
        "gguf": (f"{half}, {few}, checkpoint, GGUF", {**every, "quantize": "gguf"}),
        "passes": (f"fp32, {one}, {PASS} tokens", {**whole, "pass_tokens": PASS}),
        "optimizer": (f"fp32, {one}, 8-bit Adam", {**whole, "optimizer_bits": 8}),
    }
    return [
        Arm(name=known[role][0], fields=known[role][1], options={"role": role}, tuned=False)
        for role in _roles(ground, list(known))
    ]


def _roles(ground: Ground, known: Sequence[str]) -> list[str]:
    """What is measured: what was asked for, or all that this model has; the baseline always."""
    for value in ground.values:
        if value not in known:
            raise ConfigError(
                f"--values of the memory study are {', '.join(known)}; got {value!r}{nearest(value, known)}"
            )
    if ground.values:
        return list(dict.fromkeys((BASELINE, *ground.values)))
    left = set() if gguf_file(ground.model) is not None else {"gguf"}
    left |= {"optimizer"} if ground.quick else set()
    return [role for role in known if role not in left]


def largest_part(batch: int) -> int:
    """The largest part, a quarter of the batch at most, that divides it.

    Raises:
        ConfigError: a batch of one row cannot be cut.
    """
    if batch < 2:
        raise ConfigError("gradient accumulation cuts a batch: --batch-size must be 2 or more")
    return max(n for n in range(1, batch) if batch % n == 0 and (n <= batch / 4 or n == 1))


def half_precision() -> str:
    """bf16; fp16 on a GPU that has no bf16."""
    poor = torch.cuda.is_available() and resolve_precision("auto") == "fp32"
    return "fp16" if poor else "bf16"


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The source's table, what each saving costs in time, and the cheapest that keeps the curve."""
    found = Savings.of(records)
    if not found.runs:
        words = Text("Nothing has been measured yet.", "還沒有任何測量結果。")
        return Answer(sentence=words, blanks=blanks(found))
    best = found.cheapest()
    return Answer(
        sentence=sentence(found),
        findings=findings(found),
        blanks=blanks(found),
        tables=[table(found)],
        figures=figures_of(found),
        method=METHOD,
        caution=_caution(found),
        advice=_advice(found.runs[best][0]) if best is not None else {},
        next=Text(
            "Measure with longer rows or a larger batch (--max-length, --batch-size): the more "
            "activations, the more there is to save.",
            "改用更長的資料或更大的批次（--max-length、--batch-size）測量：活化值越多，能省的越多。",
        ),
    )


def _advice(record: Record) -> dict[str, Any]:
    """The fields that save, without those that every arm has."""
    fields = {k: v for k, v in record.arm.fields.items() if k not in SHARED}
    if fields.get("pass_tokens") == WHOLE:
        del fields["pass_tokens"]  # only there so that no batch was cut behind one's back
    return fields


METHOD = Text(
    "Every arm is a fresh process that trains the same LoRA on the same rows with the same number of "
    "rows in each step. The peak is what the operating system (or the GPU's allocator) counted. Once "
    "the model is loaded the count begins anew, so that the steps' own peak is seen even where "
    "loading took more. Mixed precision here is a frozen base in 16 bits with an adapter in fp32. "
    "Loss curves are compared with the baseline's step by step; one that is never further off than "
    f"{100 * CLOSE:.0f} % is said to be kept; where the base has dropout, a batch that is cut draws other masks. Time is "
    "paired step by step.",
    "每一組都在全新的行程中，以相同的資料、每步相同的筆數訓練同一個 LoRA。峰值由作業系統（或 GPU 配置器）計算；"
    "模型載入完成後重新計數，因此即使載入時用量更高，也看得到訓練步驟本身的峰值。這裡的混合精度是 16 位元的凍結基礎模型加上 fp32 的 adapter。"
    f"損失曲線逐步與基準比較，始終相差不超過 {100 * CLOSE:.0f}% 才算保持；基礎模型若有 dropout，切開的批次會抽到不同的遮罩。時間逐步配對比較。",
)


def _caution(found: Savings) -> Text:
    """What would change the answer."""
    words = Text(
        "Savings depend on the rows: long rows and large batches hold more activations, a larger "
        "model more weights. A few steps tell memory and time, not the end of training.",
        "節省幅度取決於資料：資料越長、批次越大，活化值越多；模型越大，權重越多。幾個步驟足以看出記憶體與時間，看不出訓練的終點。",
    )
    if found.at_floor():
        names = [WORDS[role] for role in found.at_floor()]
        words += Text(
            f"At the floor, where loading the model is the peak: {', '.join(n.en for n in names)}.",
            f"已到底線（載入模型就是峰值）：{'、'.join(n.zh for n in names)}。",
        )
    return words
