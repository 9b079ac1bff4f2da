"""Tables and figures of the low-rank study."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from loralab.studies import figures
from loralab.studies.evidence import Metric, count, plain
from loralab.studies.measures.dimension import target
from loralab.studies.measures.overlaps import LARGE, SIDES, SMALL
from loralab.studies.measures.spectra import SHARES, shares_of
from loralab.studies.readings.lowrank_claims import PAIR_NAMES, SIDE_NAMES, Read
from loralab.studies.study import Figure, Text
from loralab.studies.study import OldTable as Table


def module_table(read: Read) -> list[Table]:
    """Every kind of module over its layers: size of the update and its ranks beside chance."""
    if not read.modules:
        return []
    columns = (
        Text("module (median of layers)", "模組（各層中位數）"),
        Text("shape", "形狀"),
        Text("|dW| / |W|", "|ΔW| / |W|"),
        Text("90 % of energy (random)", "90% 能量（隨機）"),
        Text("effective rank (random)", "有效秩（隨機）"),
        Text("stable rank (random)", "穩定秩（隨機）"),
    )
    rows = []
    for kind in dict.fromkeys(row["module"] for row in read.modules):
        own = [row for row in read.modules if row["module"] == kind]

        def middle(key: str, own: Sequence[Any] = own) -> float:
            return statistics.median(float(row[key]) for row in own)

        pairs = [
            f"{plain(middle(key), 0)} ({plain(middle(f'random_{key}'), 0)})"
            for key in ("rank90", "effective", "stable")
        ]
        shape = " x ".join(map(str, own[0]["shape"]))
        rows.append([kind, shape, f"{100 * middle('relative'):.2g} %", *pairs])
    return [Table(title=Text("The update of a full fine-tune", "完整微調的更新"), columns=columns, rows=rows)]


def dimension_table(read: Read, metric: Metric) -> list[Table]:
    """The score of every d."""
    if not read.curves:
        return []
    rows = [
        [
            variant.upper(),
            count(d),
            f"{100 * d / max(1, read.large):.2g} %",
            metric.value((1 if metric.rises else -1) * float(items.mean())),
        ]
        for variant, curve in read.curves.items()
        for d, items in curve.items()
    ]
    columns = (Text("variant", "變體"), Text("d", "d"), Text("d / D", "d / D"), Text("score", "分數"))
    return [Table(title=Text("Random subspaces", "隨機子空間"), columns=columns, rows=rows)]


def order_table(read: Read) -> list[Table]:
    """Table 7 of the paper: what W has in the directions of the update, of chance, of itself."""
    if not read.pairs:
        return []
    columns = (
        Text("update", "更新"),
        Text("|dW|", "|ΔW|"),
        Text("chance r / sqrt(I O) |W|", "隨機 r / √(I O) |W|"),
        Text("|U' W V| of the update", "更新方向的 |U' W V|"),
        Text("W's own first r", "W 自己的前 r 個方向"),
        Text("|W|", "|W|"),
        Text("amplification", "放大倍數"),
    )
    found = [row for r in read.pairs for row in r.tables["amplification"]]
    rows = []
    for rank in (SMALL, LARGE):
        own = [row for row in found if row["rank"] == rank]
        keys = ("update", "chance", "inside", "own", "weight", "factor")
        rows.append([f"r={rank}", *(plain(statistics.median(row[k] for row in own), 2) for k in keys)])
    return [
        Table(title=Text("Amplification (median of modules)", "放大倍數（各模組中位數）"), columns=columns, rows=rows)
    ]


def energy_figure(read: Read) -> list[Figure]:
    """Energy against rank: the median layer of every kind of module, and random matrices."""
    if not read.modules:
        return []
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(row["module"] for row in read.modules):
        own = [row for row in read.modules if row["module"] == kind]
        rows += _energy(kind, [row["energy"] for row in own])
    for shape in dict.fromkeys(tuple(sorted(row["shape"])) for row in read.modules):
        one = next(row for row in read.modules if tuple(sorted(row["shape"])) == shape)
        rows += _energy(f"random {shape[0]} x {shape[1]}", [one["random_energy"]])
    return [
        figures.old(
            "lines",
            "lowrank-energy",
            Text("Energy of the update held by its first directions", "前幾個方向所含的更新能量"),
            rows,
            x=Text("share of all directions", "方向比例"),
            y=Text("share of the energy", "能量比例"),
            arm=Text("module", "模組"),
            log_x=True,
            percent=True,
        )
    ]


def _energy(name: str, curves: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    middle = np.median(np.asarray(curves, dtype=float), axis=0)
    return [{"arm": name, "x": x, "y": float(y)} for x, y in zip(SHARES, middle, strict=True)]


def layer_figure(read: Read) -> list[Figure]:
    """For every layer and module, the share of directions that hold 90 % of the energy."""
    if not read.modules:
        return []
    rows = [
        {"x": "–" if row["layer"] < 0 else str(row["layer"]), "y": row["module"], "value": share}
        for row, share in zip(read.modules, shares_of(read.modules), strict=True)
    ]
    return [
        figures.old(
            "heat",
            "lowrank-layers",
            Text("Share of directions that hold 90 % of the energy", "含 90% 能量所需的方向比例"),
            rows,
            x=Text("layer", "層"),
            y=Text("module", "模組"),
            value=Text("share", "比例"),
            numbers=len({row["x"] for row in rows}) <= 16,
        )
    ]


def curve_figure(read: Read, metric: Metric) -> list[Figure]:
    """The score against d; dashed: what d90 has to reach."""
    if not read.curves:
        return []
    sign = 1 if metric.rises else -1
    rows = [
        {"arm": variant.upper(), "x": d, "y": sign * float(items.mean())}
        for variant, curve in read.curves.items()
        for d, items in curve.items()
    ]
    goal = None
    if read.full and read.floor is not None:
        full = np.asarray([r.items["score"] for r in read.full], dtype=float).mean(axis=0)
        goal = sign * target(full, read.floor)
    return [
        figures.old(
            "lines",
            "lowrank-dimension",
            Text(
                "Score in a random subspace; dashed: 90 % of full fine-tuning's gain",
                "隨機子空間中的分數；虛線：完整微調增益的 90%",
            ),
            rows,
            x=Text("d", "d"),
            y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
            arm=Text("variant", "變體"),
            log_x=True,
            chance=goal,
            percent=metric.rises,
        )
    ]


def phi_figures(read: Read) -> list[Figure]:
    """phi less its chance level, as a heat map for every pair and side (median of modules)."""
    if not read.pairs:
        return []
    table = read.pairs[0].tables["phi"]
    found = []
    for pair, name in PAIR_NAMES.items():
        for side in SIDES:
            rows = [
                {"x": str(row["j"]), "y": str(row["i"]), "value": row["phi"] - row["chance"]}
                for row in table
                if row["pair"] == pair and row["side"] == side
            ]
            where = SIDE_NAMES[side]
            found.append(
                figures.old(
                    "heat",
                    f"lowrank-phi-{pair}-{side}",
                    Text(
                        f"phi(i, j) less chance: {name.en}, {where.en}", f"phi(i, j) 減隨機水準：{name.zh}，{where.zh}"
                    ),
                    rows,
                    x=Text("j", "j"),
                    y=Text("i", "i"),
                    value=Text("above chance", "高於隨機"),
                )
            )
    return found
