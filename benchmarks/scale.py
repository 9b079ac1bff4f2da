"""What one machine does with adapters, and when the next step is due: the tables of docs/scale.md.

Calculated from formulas (scale_formulas.py) and from what was measured (results/*.json); no torch.
Machines other than the measured one are assumptions; give your own, and what an hour of it costs.

    python benchmarks/scale.py [--machine GB GB/s TFLOP/s PRICE] [--only NAME ...]
        [--json FILE] [--update docs/scale.md]
"""

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scale_formulas as f
from scale_formulas import SHAPES, Machine, Shape, number_of

RESULTS = Path(__file__).with_name("results")
COUNTS = (10, 1_000, 100_000)
SMALL, *BASES = SHAPES.values()
ASSUMED = (  # of the order of what data sheets of such machines say
    Machine(name="32 cores", memory=256e9, bandwidth=250e9, flops=30e12, kept=6),
    Machine(name="card of 24 GB", memory=24e9, bandwidth=800e9, flops=100e12),
    Machine(name="card of 80 GB", memory=80e9, bandwidth=2e12, flops=300e12),
    Machine(name="8 cards of 80 GB", memory=640e9, bandwidth=16e12, flops=2400e12, price=8),
)
CARD = ASSUMED[2]
CORES = 2  # of the machine of results/machine.json
TRAINS = 0.4  # share of FLOP/s that training reaches on a machine that we did not measure
AT_ONCE = 2048  # tokens of a training pass, and of an answer with its prompt
PLACES, EXPONENT = 64, 1.0  # --resident; popularity as in S-LoRA's power law (arXiv:2311.03285)
LINKS = {"1 Gbit/s": 0.125e9, "25 Gbit/s": 3.125e9, "300 GB/s": 300e9}
Head, Rows = Sequence[str], list[list[str]]


def results(name: str) -> dict[str, Any]:
    """What a benchmark has measured."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def here() -> Machine:
    """The machine of results/machine.json."""
    found = results("machine")
    cores = CORES / found["threads"]  # one core's figures twice are what two can do at most
    return Machine(
        name=f"{CORES} cores",
        memory=24e9,
        kept=6,
        bandwidth=cores * max(found["memory"]["bytes_per_second"]),
        flops=cores * max(found["products"]["flops"]),
    )


def load_line() -> tuple[float, float]:
    """Fixed seconds of a cold load and seconds a byte, from the smallest and the largest rank."""
    cells = list(results("machine")["loads"].values())
    (x, y), (x2, y2) = ((c["bytes"], c["added_ms"] / 1e3) for c in (cells[0], cells[-1]))
    slope = (y2 - y) / (x2 - x)
    return y - slope * x, slope


def cold(shape: Shape) -> float:
    """Seconds of a cold load of an adapter of rank 8, on the measured machine."""
    return f.cold_seconds(f.adapter_bytes(shape), *load_line())


def shown(value: float) -> str:
    """Two digits, or three above 100; "0.031", "4.7", "82", "4,630"."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{float(f'{value:.2g}'):.10f}".rstrip("0").rstrip(".")


def size(value: float) -> str:
    """Bytes in words."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{shown(value / factor)} {unit}"
    return f"{shown(value / 1e3)} kB"


def fitting(shape: Shape, machine: Machine) -> tuple[str, int]:
    """The widest numbers in which a base fits with its answers, and adapters that fit beside it."""
    for kind in f.LINEAR_BYTES:
        room = f.room_for_adapters(shape, machine, kind)
        if room >= 1:
            return kind, room
    return "", 0


# -- the tables ------------------------------------------------------------------------------------


def bases(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = [
        [
            s.name,
            f"{f.parameters(s) / 1e9:.2f}",
            *(shown(f.base_bytes(s, k) / 1e9) for k in f.LINEAR_BYTES),
            f"{f.lora_parameters(s):,}",
            size(f.adapter_bytes(s)),
            f"{f.adapter_bytes(s) / f.base_bytes(s):.1%}",
            f"{f.kv_bytes(s) / 1e3:.0f} kB",
        ]
        for s in SHAPES.values()
    ]
    return (
        "base",
        "10^9 numbers",
        "GB bf16",
        "GB int8",
        "GB NF4",
        "LoRA r=8, numbers",
        "its file",
        "of the base",
        "cache of a token",
    ), rows


def disk(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = [[f"{n:,}", *(f"{size(f.disk_bytes(s, n))} : {size(f.merged_bytes(s, n))}" for s in BASES)] for n in COUNTS]
    return ("adapters", *(s.name for s in BASES)), rows


def fit(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for machine in machines:
        cells = [fitting(s, machine) for s in BASES]
        rows.append(
            [
                machine.name,
                size(machine.memory),
                *(f"{kind}, {min(room, 10**5):,}" if kind else "-" for kind, room in cells),
            ]
        )
    return ("machine", "memory", *(s.name for s in BASES)), rows


def decode(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for s in BASES:
        cells = [shown(f.decode_bytes(s, "bf16", n, n, 512) / 1e9) for n in (1, 32)]
        for machine in machines:
            kind, _ = fitting(s, machine)
            one, many = (f.decode_ceiling(s, machine, kind or "bf16", n, n, 512) for n in (1, 32))
            mark = "" if kind in ("", "bf16") else f" {kind}"
            cells.append(f"{shown(one)} / {shown(many)}{mark}" if kind else "-")
        rows.append([s.name, *cells])
    return ("base", "GB a step, 1 answer", "32 answers, 32 adapters", *(m.name for m in machines)), rows


def price(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for s in BASES:
        cells = []
        for machine in machines:
            kind, _ = fitting(s, machine)
            speed = f.decode_ceiling(s, machine, kind or "bf16", 32, 32, 512)
            cells.append(shown(machine.price * 1e6 / speed / 3600) if kind else "-")
        rows.append([s.name, *cells])
    return ("base", *(m.name for m in machines)), rows


def hits(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    places = (PLACES, 256, 1_000, 10_000)
    rows = [
        [f"{n:,}", *(" / ".join(f"{f.hit_rate(n, k, s):.0%}" for s in (0.7, 1.0, 1.3)) for k in places)] for n in COUNTS
    ]
    return ("adapters", *(f"{k:,} places" for k in places)), rows


def waits(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    few, many = (f.hit_rate(n, PLACES, EXPONENT) for n in COUNTS[1:])
    for s in (SMALL, *BASES):
        wait = cold(s)
        rows.append(
            [
                s.name,
                size(f.adapter_bytes(s)),
                shown(wait),
                f"{f.needed_hits(wait, 0.05):.0%}",
                *(shown((1 - own) * wait) for own in (few, many)),
                *(shown(f.most_requests(wait, own)) for own in (few, many)),
            ]
        )
    return (
        "base",
        "adapter",
        "cold load, s",
        "hits for a mean wait of 50 ms",
        "mean wait, s: 1,000 adapters",
        "100,000",
        "requests/s at most: 1,000 adapters",
        "100,000",
    ), rows


def routes(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for n in COUNTS[1:]:
        for replicas in (1, 4, 16):
            anywhere = f.hit_rate(n, PLACES, EXPONENT)
            by_adapter = f.hit_rate(n, replicas * PLACES, EXPONENT)
            rows.append([f"{n:,}", str(replicas), f"{anywhere:.0%}", f"{by_adapter:.0%}"])
    return ("adapters", "replicas", "hits, requests sent anywhere", "hits, sent by adapter"), rows


def training(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for s in (SMALL, *BASES):
        sizes = [f.train_bytes(s, kind, AT_ONCE) / 1e9 for kind in ("bf16", "nf4")]
        flops = f.train_flops(s, length=512, labelled=0.4)
        hours = [f.train_hours(1e7, flops, m, share_of(m)) for m in machines]
        fits = [any(g * 1e9 < 0.95 * m.memory for g in sizes) for m in machines]
        cells = [shown(h) if fine else "-" for h, fine in zip(hours, fits, strict=True)]
        rows.append([s.name, *map(shown, sizes), shown(f.full_bytes(s) / 1e9), shown(flops / 1e9), *cells])
    return (
        "base",
        "GB, LoRA bf16",
        "GB, LoRA on NF4",
        "GB, every weight",
        "GFLOP a token",
        *(f"hours, {m.name}" for m in machines),
    ), rows


def many(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for n in COUNTS:
        cells = []
        for s in BASES:
            flops = f.train_flops(s, length=512, labelled=0.4)
            cells.append(shown(f.train_hours(n * 1e5, flops, CARD, TRAINS)))
        rows.append([f"{n:,}", *cells])
    return ("adapters", *(s.name for s in BASES)), rows


def network(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for s in BASES:
        flops = f.train_flops(s, length=512, labelled=0.4)
        work = 3600 * f.train_hours(AT_ONCE, flops, CARD, TRAINS)
        sent = {
            "gradients of LoRA r=8": f.all_reduce_bytes(s, 8),
            "gradients of every weight": f.all_reduce_bytes(s, 8, full=True),
            "FSDP2's parts of the base": f.all_gather_bytes(s, 8),
        }
        for what, count in sent.items():
            times = [shown(count / speed) for speed in LINKS.values()]
            rows.append([s.name, what, size(count), *times, shown(work)])
    return ("base", "what", "a process and step", *(f"s at {name}" for name in LINKS), "s of computing"), rows


def formulas(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = []
    for formula in f.FORMULAS:
        text = " ".join((formula.__doc__ or "").split()).rstrip(".").replace("*", "\\*")
        rows.append([number_of(formula), text, f"`{formula.__name__}`"])
    return ("", "formula", "in `scale_formulas.py`"), rows


def share_of(machine: Machine) -> float:
    """What of a machine's FLOP/s training reaches."""
    return trained_share() if machine.name == here().name else TRAINS


def trained_share() -> float:
    """The measured one: `scaling.py`, 4 rows of 256 tokens, loss on 40 %."""
    speed = results("scaling")["groups"]["rank"]["8"]["tokens_per_second"]["median"]
    return speed * f.train_flops(SMALL, length=256, labelled=0.4) / here().flops


# -- calculated against measured -------------------------------------------------------------------


def checks(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = [*checked_sizes(), *checked_training(), *checked_serving(), checked_load()]
    return ("what", "formula", "calculated", "measured", "measured / calculated", "by"), rows


def checked(what: str, formula: Callable[..., Any], own: float, measured: float, unit: str, by: str) -> list[str]:
    """A row of the comparison."""
    values = [f"{shown(value)} {unit}".strip() for value in (own, measured)]
    return [what, number_of(formula), *values, f"{measured / own:.2f}", f"`{by}`"]


def checked_sizes() -> Rows:
    loads = results("serve")["loads"]
    held = f.base_bytes(SMALL) + 64 * f.resident_bytes(SMALL, 4, here().kept) + 60e6 + f.LIBRARIES
    return [
        checked(
            "adapter of rank 4, file",
            f.adapter_bytes,
            f.adapter_bytes(SMALL, 4) / 1e6,
            loads["bytes"] / 1e6,
            "MB",
            "serve.py",
        ),
        *(
            checked(
                f"serving, 64 resident of rank 4, after {n} loads",
                f.resident_bytes,
                held / 1e9,
                loads["rss_mb"][n // 100 - 1] / 1e3,
                "GB",
                "serve.py",
            )
            for n in (100, 300)
        ),
    ]


def checked_training() -> Rows:
    cells, groups = results("memory")["cells"], results("scaling")["groups"]
    peaks = {"usual": f.train_bytes(SMALL, "bf16", 1024, checkpointed=False), "precision fp32": peak_in_fp32()}
    rows = [
        checked(f"training, peak, {name}", f.train_bytes, own / 1e9, cells[name]["peak"] / 1e9, "GB", "memory.py")
        for name, own in peaks.items()
    ]
    for length in ("256", "2048"):
        flops = f.train_flops(SMALL, length=int(length), labelled=0.4)
        speed = groups["length"][length]["tokens_per_second"]["median"]
        rows.append(
            checked(
                f"training, rows of {length}, tokens/s", f.train_flops, here().flops / flops, speed, "", "scaling.py"
            )
        )
    return rows


def peak_in_fp32() -> float:
    """As `train_bytes`, with 4 bytes for each number of the base and of what is kept."""
    fixed = f.FP32 * f.parameters(SMALL) + f.STATE * f.lora_parameters(SMALL)
    kept = 1024 * f.activation_bytes(SMALL, number=f.FP32)
    return fixed + f.ALLOCATED * kept + f.WORKSPACE + f.LIBRARIES


def checked_serving() -> Rows:
    rows = []
    for answers in (1, 8, 32):
        for mode, distinct in (("none", 0), ("mixed", min(answers, 10))):
            own = f.answer_ceiling(SMALL, here(), answers, distinct, 32, 64)
            found = middle(results("serve")["compared"][f"{answers} {mode}"]["loralab"])
            what = f"writing, batch {answers}, adapters {distinct}, tokens/s"
            rows.append(checked(what, f.answer_ceiling, own, found, "", "serve.py"))
    return rows


def checked_load() -> list[str]:
    cells = list(results("machine")["loads"].values())
    own = f.cold_seconds(cells[1]["bytes"], *load_line())
    return checked(
        "cold load of rank 16, from ranks 4 and 64", f.cold_seconds, 1e3 * own, cells[1]["added_ms"], "ms", "machine.py"
    )


def store(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = [
        [f"{int(count):,}", *(shown(min(own[key])) for key in own)]
        for count, own in results("machine")["store"].items()
    ]
    return (
        "adapters",
        "opening, s",
        "listing all, ms",
        "one that is not in memory, ms",
        "one in memory, ms",
        "no such name, ms",
    ), rows


def this_machine(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    own, found = here(), results("machine")
    fixed, slope = load_line()
    rows = [
        ["memory, read", f"{shown(own.bandwidth / 1e9)} GB/s"],
        ["bf16 products", f"{shown(own.flops / 1e9)} GFLOP/s"],
        ["disk, nothing cached", f"{shown(middle(found['disk']['bytes_per_second']) / 1e9)} GB/s"],
        ["cold load, fixed", f"{shown(1e3 * fixed)} ms"],
        ["cold load, each MB", f"{shown(1e9 * slope)} ms"],
        ["training's share of its products", f"{trained_share():.0%}"],
    ]
    return ("measured by `machine.py` and `scaling.py`", "2 cores"), rows


def assumed(machines: Sequence[Machine]) -> tuple[Head, Rows]:
    rows = [
        [m.name, size(m.memory), f"{shown(m.bandwidth / 1e9)} GB/s", f"{shown(m.flops / 1e12)} TFLOP/s", shown(m.price)]
        for m in machines
    ]
    return ("machine", "memory", "bandwidth", "bf16", "price of an hour"), rows


TABLES: dict[str, Callable[[Sequence[Machine]], tuple[Head, Rows]]] = {
    "machines": assumed,
    "bases": bases,
    "disk": disk,
    "fit": fit,
    "decode": decode,
    "price": price,
    "hits": hits,
    "waits": waits,
    "routes": routes,
    "store": store,
    "training": training,
    "many": many,
    "network": network,
    "this machine": this_machine,
    "checks": checks,
    "formulas": formulas,
}


def markdown(head: Head, rows: Rows) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def updated(text: str, tables: Mapping[str, str]) -> str:
    """A document with its tables made anew: each stands between two comments that name it.

    Raises:
        KeyError: the document asks for a table that is not there.
    """

    def fresh(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", fresh, text, flags=re.S)


def made(machines: Sequence[Machine], only: Sequence[str] = tuple(TABLES)) -> dict[str, str]:
    """The tables in Markdown, by name."""
    return {name: markdown(*TABLES[name](machines)) for name in only}


def main() -> None:
    """Print the tables, or put them into a document."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument(
        "--machine",
        nargs=4,
        type=float,
        metavar=("GB", "GB/s", "TFLOP/s", "PRICE"),
        help="one of your own, and the price of an hour",
    )
    options.add_argument("--only", nargs="+", choices=[*TABLES], default=[*TABLES])
    options.add_argument("--json", type=Path, help="write the tables' cells here too")
    options.add_argument("--update", type=Path, help="put the tables into this document")
    chosen = options.parse_args()
    machines = [here(), *ASSUMED]
    if chosen.machine:
        gigabytes, bandwidth, flops, cost = chosen.machine
        machines.append(
            Machine(name="yours", memory=gigabytes * 1e9, bandwidth=bandwidth * 1e9, flops=flops * 1e12, price=cost)
        )
    if chosen.update:
        text = chosen.update.read_text(encoding="utf-8")
        chosen.update.write_text(updated(text, made(machines)), encoding="utf-8")
        return
    for name, text in made(machines, chosen.only).items():
        print(f"{name}\n\n{text}\n")
    if chosen.json is not None:
        cells = {name: TABLES[name](machines) for name in chosen.only}
        content = {"machines": [dataclasses.asdict(m) for m in machines], "tables": cells}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
