"""What a Vision Transformer is made of, counted, beside a language model's blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.errors import LoralabError
from loralab.models.catalog import MODELS
from loralab.models.pictures import side as side_of
from loralab.models.source import resolve
from loralab.studies.catalog import WRITER
from loralab.studies.evidence import count
from loralab.studies.places import layout
from loralab.studies.prepare import base_of
from loralab.studies.study import Cell, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.studies.trained import Tell

MEASURE_ANATOMY = "loralab.studies.measures.anatomy:measure"
RANK = 8


def measure(cell: Cell, folder: Path, tell: Tell) -> Record:
    """The linear layers of the study's model and of a language model; what else the first has."""
    base = base_of(cell.ground)
    tables = {"vision": layout(base.model), "facts": [facts(base.model, base.tokenizer.size)]}
    if (writer := skeleton(WRITER)) is not None:
        tables["language"] = layout(writer)
    return Record(arm=cell.arm, seed=cell.seed, tables=tables)


def skeleton(name: str) -> nn.Module | None:
    """A language model of the catalog without its numbers; None where it is not installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if MODELS[name].locate() is None:
        return None
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (LoralabError, OSError):
        return None
    with torch.device("meta"):
        found: nn.Module = AutoModelForCausalLM.from_config(config)
    return found


def facts(model: Any, side: int) -> dict[str, Any]:
    """Tokens of a picture, parameters, and whether there are convolutions, heads and masks."""
    patch = side_of(getattr(model.config, "patch_size", None)) or 1
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return {
        "side": side,
        "patch": patch,
        "patches": (side // patch) ** 2,
        "convolutions": len(convolutions),
        "convolution_parameters": sum(p.numel() for m in convolutions for p in m.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def anatomy_table(told: Mapping[str, Any]) -> list[Table]:
    """Both models' linear layers by type: shape, number, and what LoRA of rank 8 trains there."""
    if not told.get("vision"):
        return []
    rows = [
        [
            Text(*where),
            row["place"],
            row["type"],
            f"{row['outputs']} × {row['inputs']}",
            row["count"],
            count(row["count"] * RANK * (row["outputs"] + row["inputs"])),
        ]
        for where, kind in ((("this model", "這個模型"), "vision"), ((WRITER, WRITER), "language"))
        for row in told.get(kind, ())
    ]
    return [
        Table(
            title=Text("Linear layers of the vision model and of a language model", "視覺模型與語言模型的線性層"),
            columns=(
                Text("model", "模型"),
                Text("part", "部分"),
                Text("layer", "層"),
                Text("outputs × inputs", "輸出 × 輸入"),
                Text("count", "個數"),
                Text(f"LoRA r={RANK}: parameters", f"LoRA r={RANK}：參數量"),
            ),
            rows=rows,
        )
    ]


def likeness(told: Mapping[str, Any]) -> Text:
    """What the counts say is alike and what is not."""
    if not told.get("vision"):
        return Text("The model was not examined.", "還沒有檢視模型的結果。")
    rows, own = told["vision"], told["facts"][0]
    found = Text(
        f"Alike: blocks of attention and feed-forward layers, {_said(rows).en}; LoRA finds its "
        "layers in both in the same way.",
        f"相同：都由 attention 與 FFN 的 block 組成，{_said(rows).zh}；LoRA 找到這些層的方法相同。",
    )
    if told.get("language"):
        other = _said(told["language"])
        found += Text(f"The language model {WRITER} has {other.en}.", f"語言模型 {WRITER} 則是{other.zh}。")
    share = 100 * own["convolution_parameters"] / own["parameters"]
    kept = Text("", "")
    if number := own["convolutions"]:
        which = "a convolution" if number == 1 else f"{number} convolutions"
        kept = Text(
            f" through {which} ({share:.1f} % of all parameters), which all-linear leaves alone",
            f"，經由 {number} 個卷積（占全部參數 {share:.1f}%），all-linear 不動它",
        )
    return found + Text(
        f"Different: a picture of {own['side']} × {own['side']} becomes {own['patches']} patches of "
        f"{own['patch']} × {own['patch']}{kept.en}, instead of tokens looked up in a vocabulary; attention "
        "goes in both directions (no causal mask), and a new head over classes stands where a "
        "language model predicts the next token.",
        f"不同：{own['side']} × {own['side']} 的圖片切成 {own['patches']} 個 {own['patch']} × "
        f"{own['patch']} 的 patch{kept.zh}，而不是從詞表查 token；注意力是雙向的（沒有因果遮罩），"
        "並以新的分類頭取代語言模型的下一個 token 預測。",
    )


def _said(rows: Sequence[Mapping[str, Any]]) -> Text:
    """How many linear layers, of which types."""
    places = {place: [r for r in rows if r["place"] == place] for place in ("attention", "mlp")}
    total = sum(row["count"] for row in rows)
    parts = ", ".join(
        f"{place}: " + ", ".join(f"{r['type']} {r['outputs']} × {r['inputs']}" for r in own)
        for place, own in places.items()
    )
    return Text(f"{total} linear layers ({parts})", f"共 {total} 個線性層（{parts}）")
