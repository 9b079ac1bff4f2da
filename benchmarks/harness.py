"""lm-eval unchanged against `loralab serve`, beside lm-eval's own hf + peft: the same answers, and the time.

Multiple-choice tasks (YAML and JSONL, written here), SmolLM2-135M in fp32, LoRA r=8 on its seven
projections. The choices of two tasks are a token or two: lm-eval's hf then reads a question once for all of
them. Those of the third are sentences, for each of which it reads the question again. One server holds all
adapters; the other side loads the model anew for each, as lm-eval does.
An answer is the choice with the largest log-likelihood. The clock runs from the first adapter to the
last, the server's start included; importing lm-eval, the same on both sides, is not. Processor seconds are
of whole processes, that import included.

    python benchmarks/harness.py --python PYTHON [--rows 500] [--adapters 10] [--tasks NAME ...] [--json FILE]
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from served import serving, write_adapters
from sides import finish, parser, table

import loralab
from loralab.models.load import load

SIDE = Path(__file__).with_name("harness_side.py")
MODEL = "smollm2-135m"
WORDS = {
    "fruit": "apple pear plum cherry lemon mango peach grape melon orange",
    "animal": "horse tiger rabbit eagle salmon spider monkey goat whale lion",
    "colour": "red blue green yellow purple black white brown pink grey",
    "tool": "hammer saw drill wrench shovel axe chisel pliers ladder brush",
    "metal": "iron copper silver gold zinc lead tin nickel steel bronze",
    "country": "France Japan Brazil Kenya Norway India Canada Egypt Chile Spain",
}
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def kinds(count: int) -> list[dict[str, Any]]:
    """Return questions for the one word of a kind among four."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        asked, *others = draw.sample(sorted(WORDS), 4)
        words = [draw.choice(WORDS[kind].split()) for kind in (asked, *others)]
        choices = draw.sample(words, 4)
        question = f"Question: Which of these is a {asked}: {', '.join(choices)}?\nAnswer:"
        rows.append({"question": question, "choices": choices, "answer": choices.index(words[0])})
    return rows


def sums(count: int) -> list[dict[str, Any]]:
    """Return sums with four results to choose from."""
    draw = random.Random(1)
    rows = []
    for _ in range(count):
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        results = [a + b, a + b + draw.choice((1, 10)), abs(a - b), a + b - draw.choice((1, 2))]
        order = draw.sample(range(4), 4)
        rows.append(
            {
                "question": f"What is {a} plus {b}? {a} + {b} =",
                "choices": [str(results[place]) for place in order],
                "answer": order.index(0),
            }
        )
    return rows


def endings(count: int) -> list[dict[str, Any]]:
    """Return small stories with four last sentences to choose from."""
    draw = random.Random(2)
    rows = []
    for _ in range(count):
        things = [draw.choice(words.split()) for words in WORDS.values()]
        story = f"On the table lay {', '.join(things[:5])} and a letter from {things[5]}. Nobody had touched any of it."
        choices = [f"In the end she took the {thing}, and went home without another word." for thing in things[:4]]
        rows.append({"question": story, "choices": choices, "answer": draw.randrange(4)})
    return rows


TASKS = {"harness_kinds": kinds, "harness_sums": sums, "harness_endings": endings}


def write_tasks(place: Path, names: Sequence[str], rows: int) -> None:
    """Write each task as YAML, with its rows."""
    for name in names:
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in TASKS[name](rows)), encoding="utf-8")
        (place / f"{name}.yaml").write_text(YAML.format(name=name, file=file), encoding="utf-8")


def run(python: str, side: str, asked: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Let lm-eval score all adapters by one side."""
    request, answer = place / f"{side}.json", place / f"{side}-answer.json"
    request.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [python, str(SIDE), side, str(request), str(answer)], capture_output=True, text=True, check=False
    )
    if not answer.is_file():
        raise SystemExit(f"lm-eval by {side} gave no answer:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def processor_seconds() -> float:
    """Return what ended processes have used so far: on a shared machine it says more than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def best(choices: Sequence[float]) -> int:
    """Return the number of the likeliest choice."""
    return max(range(len(choices)), key=choices.__getitem__)


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many answers are the same, and how far log-likelihoods are apart."""
    same, total, furthest = 0, 0, 0.0
    for name, tasks in theirs["answers"].items():
        for task, rows in tasks.items():
            for own, other in zip(ours["answers"][name][task], rows, strict=True):
                same += best(own) == best(other)
                total += 1
                furthest = max(furthest, *(abs(a - b) for a, b in zip(own, other, strict=True)))
    return {"answers": total, "same": same, "share": same / total, "furthest": furthest}


def main() -> None:
    """Run both sides, and print."""
    options = parser(__doc__)
    options.add_argument("--python", default=sys.executable, help="the Python that has lm-eval")
    options.add_argument("--rows", type=int, default=500)
    options.add_argument("--adapters", type=int, default=10)
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "store").mkdir()
        write_tasks(place, chosen.tasks, chosen.rows)
        adapters = {f"a{number}": str(place / "store" / f"a{number}") for number in range(chosen.adapters)}
        write_adapters(load(MODEL), [*map(Path, adapters.values())], rank=8)
        asked = {"model": loralab.resolve(MODEL), "adapters": adapters, "tasks": chosen.tasks, "rows": chosen.rows}
        asked["include"] = folder
        started, spent = time.perf_counter(), processor_seconds()
        with serving(MODEL, place / "store", "--precision", "fp32", "--resident", "16") as told:
            ready = time.perf_counter() - started
            ours = run(chosen.python, "server", {**asked, "url": told["url"]}, place)
        between = processor_seconds()
        theirs = run(chosen.python, "hf", asked, place)
    found = compared(ours, theirs)
    processor = {"ours": between - spent, "hf + peft": processor_seconds() - between}
    seconds = {"ours": ready + ours["seconds"], "hf + peft": theirs["seconds"]}
    result = {
        "rows": chosen.rows,
        "adapters": chosen.adapters,
        "tasks": chosen.tasks,
        "lm_eval": ours["lm_eval"],
        "seconds": seconds,
        "server_ready": ready,
        "processor_seconds": processor,
        "share_of_time": seconds["ours"] / seconds["hf + peft"],
        **found,
    }
    text = table(
        f"lm-eval {ours['lm_eval']}, {chosen.adapters} adapters, {' '.join(chosen.tasks)} of {chosen.rows} rows",
        (
            "same answers",
            "furthest log-likelihood",
            "ours, s",
            "hf + peft, s",
            "share",
            "processor: ours, s",
            "hf + peft, s",
        ),
        [
            (
                f"{found['same']} of {found['answers']}",
                f"{found['furthest']:.1e}",
                f"{seconds['ours']:.1f}",
                f"{seconds['hf + peft']:.1f}",
                f"{result['share_of_time']:.2f}",
                *(f"{processor[side]:.1f}" for side in seconds),
            )
        ],
    )
    finish(text, result, chosen.json)


if __name__ == "__main__":
    main()
