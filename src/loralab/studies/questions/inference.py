"""Q8: does LoRA speed inference up? Merged, beside the base, many at once, and made smaller."""

from collections.abc import Sequence
from typing import Any

from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies.measures.carried import REFERENCE
from loralab.studies.measures.deployed import MEASURE_ADAPTERS, MEASURE_SMALLER
from loralab.studies.readings.inference_tables import figures_of, findings, scores, tables_of
from loralab.studies.readings.inference_words import Deployed, blanks, sentence
from loralab.studies.study import Answer, Arm, Ground, Record, Text
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

SMALLER = {"int8": "int8", "nf4": "NF4", "pruned": "50 % zeros"}
CHOICES = ("adapters", *SMALLER)
BATCHES = ((1, 8, 32), (1, 8))  # thorough, quick
ADAPTERS = (2, 8, 64)
SECONDS = ((90.0, 30.0), (16.0, 4.0))  # of timing: many variants, two variants
TRIALS = (40, 6)


def arms(ground: Ground, base: Base) -> list[Arm]:
    """The adapter's own run; one cell for all ways to use it; one for each smaller model."""
    for value in ground.values:
        if value not in CHOICES:
            raise ConfigError(
                f"--values of the inference study are {', '.join(CHOICES)}; got {value!r}{nearest(value, CHOICES)}"
            )
    wanted, quick = ground.values or CHOICES, int(ground.quick)
    shared: dict[str, Any] = {"batches": list(BATCHES[quick]), "trials": TRIALS[quick]}
    found = [REFERENCE]
    if "adapters" in wanted:
        options = {
            **shared,
            "measure": MEASURE_ADAPTERS,
            "seconds": SECONDS[quick][0],
            "adapters": list(ADAPTERS),
            "looped": [] if quick else [8],
        }
        found.append(Arm(name="latency", options=options, tuned=False, plain=True))
    for how, name in SMALLER.items():
        if how in wanted:
            options = {**shared, "measure": MEASURE_SMALLER, "seconds": SECONDS[quick][1], "how": how}
            found.append(Arm(name=name, options=options, tuned=False, plain=True))
    return found


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Every way against its own control, at every batch; the source's three points; a view."""
    found = Deployed.of(records)
    if not found.times:
        words = Text("Nothing has been timed yet.", "還沒有任何計時結果。")
        return Answer(sentence=words, blanks=blanks(found))
    return Answer(
        sentence=sentence(found),
        findings=[*findings(found), *scores(found)],
        blanks=blanks(found),
        tables=tables_of(found),
        figures=figures_of(found),
        method=METHOD,
        caution=CAUTION,
        next=Text(
            "Time the way that you would deploy on the machine that will serve it, at its batch.",
            "在實際服務的機器上，以實際的批次大小測量打算採用的部署方式。",
        ),
    )


METHOD = Text(
    "Greedy decoding with a key-value cache after a prompt of 16 tokens; reading the prompt is timed "
    "apart. In each trial all variants of a process take turns, in an order that turns too; the "
    "ratio to the control is taken trial by trial, and its median has an interval from order "
    "statistics. Merged and unmerged share one process with the base; int8, NF4 and 50 % zeros are "
    "the merged model, each beside the dense merged model in its own process (int8 beside fp32). "
    "Several adapters: each row has its own; the base runs once for all rows, and what the adapters "
    "add is two products with all their ranks side by side, or one pair each where they are few; "
    '"looped" goes adapter by adapter, as peft does. Unmerged is loralab\'s own forward pass. Models '
    "that write no text are timed by whole passes of 64 tokens.",
    "以 16 個 token 的提示開始，用 KV 快取做貪婪解碼；讀取提示另外計時。每一輪中同一行程的所有組別輪流執行，順序也輪替；"
    "與對照組的比值逐輪計算，中位數的區間由順序統計量得出。合併與未合併和基礎模型在同一行程；int8、NF4 與 50% 歸零是合併後的模型，"
    "各在自己的行程中與稠密的合併模型並列（int8 與 fp32 並列）。多個 adapter：每一列用自己的 adapter；基礎模型對所有列只算一次，adapter 的部分則把所有秩並排成兩次矩陣乘法，數量少時各算一對；"
    "「looped」則像 peft 一樣逐個 adapter 計算。未合併使用 loralab 自己的前向傳播。不產生文字的模型以 64 個 token 的整次前向計時。",
)
CAUTION = Text(
    "Latencies are this machine's: a GPU has kernels for 4 and 8 bits and for sparse patterns that "
    "this run may not have had, and a server batches and schedules on top. Zeros were set without "
    "training afterwards.",
    "延遲只代表這台機器：GPU 有 4、8 位元與稀疏運算的專用核心，這次執行不一定有；伺服器還會做批次與排程。歸零後沒有再訓練。",
)
