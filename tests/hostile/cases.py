"""The commands that disasters befall, and what must hold of each afterwards."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from hostile.crash import DISASTERS, PARTIAL, Disaster, Ended, Victim, healed, small_disk
from studies.outcomes import results

from loralab.adapters import folder
from loralab.artefacts.certificate import verify
from loralab.errors import AdapterFileError, LoralabError
from loralab.studies import store
from loralab.training import checkpoint
from loralab.training.record import LOG, read_metrics

RUN_FILES = (folder.TENSORS, folder.CONFIG, folder.RECORD, "config.toml")
STEPS = 40
TRAIN = [
    "--max-steps",
    STEPS,
    "--save-every",
    3,
    "--batch-size",
    4,
    "--evaluate-every",
    7,
    "--dropout",
    0.2,
    "--rank",
    2,
    "--quiet",
]
JOBS = """
[[job]]
name = "a"
learning_rate = 0.01

[[job]]
name = "b"
method = "pissa"
seed = 3
max_steps = 20

[[job]]
name = "c"
rank = 3
gradient_checkpointing = "on"
"""
ALL = list(DISASTERS)


@dataclass
class Tally:
    """Record of what happened: counts by (disaster, what), and whatever was not as it must be."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.counts + other.counts, self.problems + other.problems)

    def note(self, disaster: str, *what: str) -> None:
        """Count what has happened."""
        self.counts.update((disaster, one) for one in what)

    def table(self, command: str) -> str:
        """One line for each disaster."""
        names = list(dict.fromkeys(name for name, _ in self.counts))
        columns = ("befallen", "met alive", "said so", "resumed", "same bytes")
        lines = [f"{'command':8}{'disaster':20}" + "".join(f"{one:>12}" for one in columns)]
        for name in sorted(names):
            numbers = "".join(f"{self.counts[name, one]:12}" for one in columns)
            lines.append(f"{command:8}{name:20}{numbers}")
        return "\n".join(lines)


class Ground:
    """A tiny model, its rows, and adapters trained on them, in a folder for all cases."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        self.root, self.model, self.data = root, model, data

    def adapters(self) -> Path:
        """The folder of three adapters, a, b and c."""
        place = self.root / "adapters"
        if not place.is_dir():
            done = Victim(Jobs.command_of(self, place)).end()
            assert done.code == 0, done.said
        return place


class Case:
    """A command, its undisturbed run, and what a disaster must leave.

    `meets` are the disasters that can befall it; `resume` is what the command needs to go on.

    One exception: a matrix library that is refused memory takes another way without a word, whose
    last bits differ. So of a command that ran short of memory the result must be whole and proved,
    and `starved` says that it need not be the same.
    """

    name = ""
    meets: Sequence[str] = ALL
    resume: Sequence[object] = ("--resume",)
    starved = False

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.whole = ground.root / self.name / "whole"
        self.whole.mkdir(parents=True)
        self._number = 0
        self.prepare()
        Victim(["tasks", "--json"]).end()  # now everything is imported
        started = time.perf_counter()
        done = Victim(self.command(self.whole)).end()
        self.seconds = time.perf_counter() - started
        assert done.code == 0, done.said

    def prepare(self) -> None:
        """Write what the command needs."""

    def command(self, place: Path) -> list[object]:
        """The command line that works in a folder."""
        raise NotImplementedError

    def outputs(self, place: Path) -> list[Path]:
        """The artefacts that it makes there."""
        raise NotImplementedError

    def broken(self, place: Path) -> list[str]:
        """Return what is wrong with the state that a disaster left."""
        raise NotImplementedError

    def different(self, place: Path) -> list[str]:
        """Return what differs from the undisturbed run, at the end."""
        raise NotImplementedError

    def suffers(self, disasters: Sequence[Disaster], draw: random.Random) -> Tally:
        """One after the other befalls the command in a folder; then it goes on to its end."""
        self._number += 1
        place, tally = self.ground.root / self.name / f"{self._number}", Tally()
        self.starved = False
        with small_disk(place) as small:
            for number, disaster in enumerate(disasters):
                if disaster.name == "no space" and not small:
                    continue
                more = self.resume if number else ()
                ended = self.struck(disaster, place, more, draw, tally)
                tally.problems += [f"{disaster.name}: {what}" for what in self.wrong(ended, place)]
            self.goes_on([one.name for one in disasters], place, tally)
            if tally.problems:
                kept = place.with_name(f"{place.name}.kept")
                shutil.copytree(place, kept)
                tally.problems = [f"{what}  [{kept}]" for what in tally.problems]
        shutil.rmtree(place, ignore_errors=True)
        return tally

    def struck(
        self, disaster: Disaster, place: Path, more: Sequence[object], draw: random.Random, tally: Tally
    ) -> Ended:
        """Start it and let the disaster come; how it ended."""
        real = draw.random() < 0.06
        self.starved |= disaster.name == "no memory"
        moment = draw.uniform(0, 1.1 * self.seconds) + (draw.uniform(0, 6) if real else 0)
        started = time.perf_counter()
        with healed(place):
            victim = Victim([*self.command(place), *more], real=real)
            disaster.strike(victim, place, moment, draw)
            ended = victim.end()
        if ended.code == 0 and not real and not more:  # undisturbed after all
            self.seconds = min(self.seconds, time.perf_counter() - started)
        tally.note(disaster.name, "befallen", *(["met alive"] if ended.code else []))
        tally.problems += [f"{disaster.name}: {what}" for what in says(disaster, ended, place)]
        tally.note(disaster.name, *(["said so"] if ended.code > 0 else []))
        return ended

    def wrong(self, ended: Ended, place: Path) -> list[str]:
        """`broken`, or what was wrong with looking."""
        try:
            return self.broken(place)
        except (LoralabError, OSError, ValueError) as error:
            return [f"{type(error).__name__}: {error}"]

    def goes_on(self, names: Sequence[str], place: Path, tally: Tally) -> None:
        """Given again it comes to its end, the same as undisturbed."""
        done = Victim([*self.command(place), *self.resume]).end()
        what = [f"does not go on: {done.code} {done.said}"] if done.code else self.different(place)
        bad = what
        if self.starved and not done.code and what:
            bad = [f"{p} is not proved" for p in self.outputs(place) if not accepted(p)]
        tally.problems += [f"after {', '.join(names)}: {one}" for one in bad]
        for name in names:
            tally.note(name, *(["resumed"] if not done.code else []))
            tally.note(name, *(["same bytes"] if not what else []))


def says(disaster: Disaster, ended: Ended, place: Path) -> list[str]:
    """Return what is wrong with the end of a command, and with its messages."""
    lines = [line for line in ended.said.splitlines() if line.strip()]
    unclear = any("internal error" in line for line in lines) and disaster.name != "no memory"
    if "Traceback" in ended.said or unclear:
        return [f"says {ended.said!r}"]
    if ended.code == 0 or not (disaster.error or disaster.name in ("SIGTERM", "Ctrl-C")):
        return []
    if not disaster.error:
        # CPython ends by SIGINT itself where an exec() of a string was interrupted on the way; a
        # shell says 130 of both
        fine = ended.code in (130, -signal.SIGINT) and len(lines) == 1 and "--resume" in lines[0]
        return [] if fine else [f"ends with {ended.code} {ended.said!r}"]
    named = all("cannot write" in line and "/" in line for line in lines)
    one = lines and all(line.startswith("error: ") for line in lines)
    fine = ended.code in (1, 2) and bool(one) and named
    return [] if fine else [f"ends with {ended.code} {ended.said!r}"]


def accepted(path: Path) -> bool:
    """Return whether a reader takes what stands there for a proved artefact."""
    try:
        return verify(path).passed
    except LoralabError:
        return False


def unlike(place: Path, whole: Path, names: Sequence[str]) -> list[str]:
    """Files that are not the same."""
    return [
        f"{place / name} differs"
        for name in names
        if not (place / name).is_file() or (place / name).read_bytes() != (whole / name).read_bytes()
    ]


def half_read(run: Path, whole: Path | None) -> list[str]:
    """Return what a reader would take for an adapter though it is not the finished one, `whole`."""
    try:
        found = folder.read(run)
    except AdapterFileError:
        return []
    if not found.record or (whole and found.digest != folder.read(whole).digest):
        return [f"{run} is read as an adapter, but is half one"]
    if whole and "certificate" in found.record and unlike(run, whole, RUN_FILES):
        return [f"{run} has another certificate"]
    return []


def leftovers(place: Path) -> list[str]:
    """Return the files that only a disaster leaves."""
    ends = (PARTIAL, ".rejected")
    return [f"{path} is left over" for path in place.rglob("*") if path.name.endswith(ends)]


class Train(Case):
    """One adapter."""

    name = "train"

    def command(self, place: Path) -> list[object]:
        own = ["--model", self.ground.model, "--data", self.ground.data]
        return ["train", *own, "--output-dir", place / "run", *TRAIN]

    def outputs(self, place: Path) -> list[Path]:
        return [place / "run"]

    def broken(self, place: Path) -> list[str]:
        found = []
        for run in self.outputs(place):
            found += half_read(run, None if self.starved else self._of_whole(run, place))
            for step in checkpoint.steps_of(run):
                path = checkpoint.at_step(run, step)
                checkpoint.read_progress(path)
                safetensors.torch.load((path / "state.safetensors").read_bytes())
        return found

    def different(self, place: Path) -> list[str]:
        found = leftovers(place)
        for run in self.outputs(place):
            whole = self._of_whole(run, place)
            found += unlike(run, whole, RUN_FILES)
            if steps(run) != steps(whole):
                found.append(f"{run} tells of the steps {steps(run)}")
            lines = (run / LOG).read_text(encoding="utf-8").splitlines()
            found += [f"{run}/{LOG}: {line}" for line in lines if "plan: " in line[1:]]
        return found

    def _of_whole(self, run: Path, place: Path) -> Path:
        return self.whole / run.relative_to(place)


def steps(run: Path) -> list[tuple[str, int]]:
    """Return the events of metrics.jsonl, in order."""
    return [(event["kind"], event["step"]) for event in read_metrics(run)]


class Jobs(Train):
    """Three adapters on one base, two together and one by itself."""

    name = "jobs"

    def command(self, place: Path) -> list[object]:
        return self.command_of(self.ground, place / "jobs")

    @staticmethod
    def command_of(ground: Ground, output: Path) -> list[object]:
        """Into any folder."""
        file = ground.root / "jobs.toml"
        if not file.is_file():
            file.write_text(JOBS, encoding="utf-8")
        own = ["--model", ground.model, "--data", ground.data, "--jobs", file]
        return ["train", *own, "--output-dir", output, *TRAIN]

    def outputs(self, place: Path) -> list[Path]:
        return [place / "jobs" / name for name in "abc"]


class Merge(Case):
    """A full model."""

    name = "merge"
    resume = ()

    def command(self, place: Path) -> list[object]:
        return ["merge", self.ground.adapters() / "a", place / "out"]

    def outputs(self, place: Path) -> list[Path]:
        return [place / "out"]

    def struck(self, *given: Any) -> Ended:
        """Strike a start whose finished work was put away, so that it has something to do."""
        shutil.rmtree(given[1] / "out", ignore_errors=True)
        return super().struck(*given)

    def broken(self, place: Path) -> list[str]:
        output, rejected = place / "out", place / "out.rejected"
        if (self.whole / "out").is_dir() and output.is_dir():
            return [f"{output} is no model"] * (self.starved and not accepted(output)) or (
                [] if self.starved else self._unlike(output)
            )
        if rejected.is_dir() and self._unlike(rejected) and accepted(rejected):
            return [f"{rejected} is accepted, but not what would be written"]
        return [f"{output} is no folder"] if output.exists() else []

    def different(self, place: Path) -> list[str]:
        return leftovers(place) + self._unlike(place / "out")

    def goes_on(self, names: Sequence[str], place: Path, tally: Tally) -> None:
        """Given again it comes to its end, the same as undisturbed."""
        if (place / "out").is_dir() and not self._unlike(place / "out"):
            shutil.rmtree(place / "out")  # complete: again, with what else the disaster left
        super().goes_on(names, place, tally)

    def _unlike(self, output: Path) -> list[str]:
        whole = self.whole / "out"
        names = {path.name for path in (*output.iterdir(), *whole.iterdir())}
        extra = [f"{output / name} is too much" for name in names if not (whole / name).exists()]
        return extra + unlike(output, whole, sorted(path.name for path in whole.iterdir()))


class Export(Merge):
    """peft's files."""

    name = "export"

    def command(self, place: Path) -> list[object]:
        return ["export", self.ground.adapters() / "b", place / "out", "--to", "peft"]


class Study(Case):
    """A cheap question."""

    name = "study"
    meets = ("killed", "killed in a write", "SIGTERM", "Ctrl-C", "disk full", "no permission")

    def command(self, place: Path) -> list[object]:
        own = ["--model", self.ground.model, "--data", self.ground.data]
        short = ["--quick", "--fixed-lr", "--steps", 12, "--test-rows", 8, "--batch-size", 4]
        values = ["--values", "2,4", "--precision", "fp32"]
        return ["study", "rank", *own, *short, *values, "--output-dir", place / "own", "--quiet"]

    def prepare(self) -> None:
        self._finished: dict[Path, bytes] = {}

    def struck(self, *given: Any) -> Ended:
        """Remember what had been measured before."""
        ended = super().struck(*given)
        self._finished = {
            file: file.read_bytes()
            for file in (given[1] / "own" / store.RUNS).glob(f"*/{store.RECORD}")
            if b'"status": "done"' in file.read_bytes()
        }
        return ended

    def broken(self, place: Path) -> list[str]:
        if not (place / "own" / store.STUDY).is_file():
            return []
        found, whole = results(place / "own"), results(self.whole / "own")
        done = [name for name, one in found.items() if one.status == "done"]
        return [f"{name} has other numbers" for name in done if found[name] != whole[name]]

    def different(self, place: Path) -> list[str]:
        again = [f"{f} is made again" for f, b in self._finished.items() if f.read_bytes() != b]
        same = results(place / "own") == results(self.whole / "own")
        return again + ([] if same else ["other results"]) + leftovers(place)
