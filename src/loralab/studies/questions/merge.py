"""Q6: does merging change the result? Every dtype and kind of base, and a hundred merges."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.models.quantize import gguf_file
from loralab.studies.evidence import SEED, Metric, claim, metric_of
from loralab.studies.measures.carried import REFERENCE
from loralab.studies.measures.drift import MEASURE_DRIFT
from loralab.studies.measures.merging import AFTER, BEFORE, MEASURE_MERGING
from loralab.studies.readings.merge_words import (
    AGAIN,
    DRIFT,
    blanks,
    drift_findings,
    drift_rows,
    drift_table,
    figures_of,
    kept_finding,
    loss_finding,
    sentence,
    states,
    table,
)
from loralab.studies.statistics import difference
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

NAMES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "nf4": "NF4",
    "nf4-again": AGAIN,
    "gguf": "GGUF",
    "drift": DRIFT,
}
SLOW_ROWS = 12  # of a dtype that the machine has no instructions for
COMPARED = (32, 8)  # rows whose logits are compared: thorough, quick
FEW_MODULES = 7  # of the hundred merges in a quick study


def arms(ground: Ground, base: Base) -> list[Arm]:
    """The adapter's own run, one arm for each form of the base, and the hundred merges."""
    chosen = [_choice(value) for value in ground.values] or usual(ground)
    packed = str(ground.fields.get("precision", "auto"))
    options: dict[str, dict[str, Any]] = {
        "fp32": {"precision": "fp32", "quantize": "none"},
        "bf16": {"precision": "bf16", "quantize": "none"},
        "fp16": {"precision": "fp16", "quantize": "none"} | ({} if _has_fp16() else {"limit": SLOW_ROWS}),
        "nf4": {"precision": packed, "quantize": "nf4"},
        "nf4-again": {"precision": packed, "quantize": "nf4", "again": True},
        "gguf": {"precision": packed, "quantize": "gguf"},
        "drift": {
            "precisions": ["fp32", "bf16"] if ground.quick else ["fp32", "bf16", "fp16"],
            "modules": FEW_MODULES if ground.quick else None,
        },
    }
    found = [REFERENCE]
    for name in dict.fromkeys(chosen):
        measure = MEASURE_DRIFT if name == "drift" else MEASURE_MERGING
        own = {k: v for k, v in options[name].items() if v is not None}
        own |= {} if name == "drift" else {"compared": COMPARED[ground.quick]}
        found.append(Arm(name=NAMES[name], options={"measure": measure, **own}, tuned=False, plain=True))
    return found


def usual(ground: Ground) -> list[str]:
    """All forms; in a quick study none that the machine would compute very slowly."""
    names = ["fp32", "bf16"]
    names += ["fp16"] if _has_fp16() or not ground.quick else []
    names += ["nf4", "nf4-again"]
    names += ["gguf"] if not ground.quick and gguf_file(ground.model) is not None else []
    return [*names, "drift"]


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """What merging changed, in what form of the base, and what a hundred merges leave."""
    found = {r.arm.name: r for r in records if "loss_difference" in r.numbers}
    drifts = drift_rows(records)
    if not found and not drifts:
        words = Text("Nothing has been merged and compared yet.", "還沒有任何合併前後的比較結果。")
        return Answer(sentence=words, blanks=blanks(found))
    metric = metric_of([*found.values(), *records])
    losses = [finding for r in found.values() if (finding := loss_finding(r, len(found)))]
    findings = [*losses, *(_finding(r, metric, len(found)) for r in found.values())]
    findings += kept_finding(found.get(AGAIN)) + drift_findings(drifts)
    tables = [table(found)] if found else []
    return Answer(
        sentence=sentence(found, drifts),
        findings=findings,
        blanks=blanks(found),
        tables=[*tables, *drift_table(drifts, records)],
        figures=figures_of(found, drifts),
        method=METHOD,
        caution=_caution(found),
        next=Text(
            "Merge an adapter that was trained for longer: a larger update loses less to rounding.",
            "合併一個訓練更久的 adapter：更新量越大，捨入損失的比例越小。",
        ),
    )


METHOD = Text(
    "One LoRA of rank 8 is trained once; every form of the base is loaded in a process of its own, "
    "scored with the adapter beside it, merged, scored again, and unmerged. Logits are compared at "
    "the last positions of the first test rows: mean KL in nats, and how often the likeliest token is "
    "the same. Merging sums in fp32 and rounds once; the original weights are kept and put back. A "
    "4-bit layer becomes a dense one. In the hundred merges three adapters take turns; subtracting "
    "is what peft's unmerge does.",
    "只訓練一次 rank 8 的 LoRA；每種形式的基礎模型各用一個獨立行程載入，先以未合併的 adapter 評分，合併後再評分一次，然後還原。"
    "logits 取前幾筆測試資料最後幾個位置比較：平均 KL（nats）與最可能 token 的一致率。合併以 fp32 相加、只捨入一次；"
    "原始權重保留，還原時放回。4 位元的層合併後換成稠密層。一百次合併由三個 adapter 輪流；「減回去」是 peft 的 unmerge 做法。",
)


def _caution(found: Mapping[str, Record]) -> Text:
    """What the numbers stand on."""
    words = Text(
        "An adapter that was trained for few steps changes the weights little, so rounding takes a larger share of it.",
        "訓練步數少的 adapter 對權重的改變小，捨入所佔的比例就大。",
    )
    slow = found.get("fp16")
    if slow is not None and slow.arm.options.get("limit"):
        n = int(slow.numbers["rows"])
        words += Text(
            f"This machine has no fp16 instructions: that arm was scored on {n} rows only.",
            f"這台機器沒有 fp16 指令，該組只以 {n} 筆資料評分。",
        )
    elif slow is None:
        words += Text(
            "fp16 was not measured here (--values fp16 measures it, slowly where the machine has no "
            "instructions for it).",
            "這裡沒有測量 fp16（可用 --values fp16 測量；機器沒有 fp16 指令時很慢）。",
        )
    return words


def _finding(record: Record, metric: Metric, family: int) -> Finding:
    """Tell whether the score changed, row by row."""
    found = difference(
        [record.items[AFTER]],
        [record.items[BEFORE]],
        generator=np.random.default_rng(SEED),
        comparisons=family,
        margin=metric.margin_at(abs(float(np.mean(record.items[BEFORE])))),
    )
    after, before = states(record.arm.name)
    if math.isnan(found.low):
        words = Text(f"{after}: one score only, no interval.", f"{after}：只有一個分數，無法估計區間。")
        return Finding(sentence=words, holds=False, effect=found.estimate)
    return claim(replace(found, a=after, b=before), metric)


def _choice(value: str) -> str:
    if value not in NAMES:
        raise ConfigError(f"--values of the merge study are {', '.join(NAMES)}; got {value!r}{nearest(value, NAMES)}")
    return value


def _has_fp16() -> bool:
    """Tell whether the machine multiplies in fp16."""
    if torch.cuda.is_available():
        return True
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_fp16") or abilities.get("amx_fp16"))
