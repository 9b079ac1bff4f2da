"""A server that is struck while its adapters come, go and change their names."""

import random
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from hostile.cases import Case, Tally, leftovers
from hostile.crash import Disaster, Ended, Victim

from loralab.adapters import folder
from loralab.serving.adapters.names import read_names
from loralab.serving.http.service import DIGEST_HEADER

FOLDERS = ("a", "b", "c")
ASKED = {"prompt": "good film", "max_tokens": 6, "temperature": 0}
Names = dict[str, str]  # name -> folder


class Server:
    """A server that answers, and what it is asked."""

    def __init__(self, command: Sequence[object]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.victim = Victim([*command, "--port", port])
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def ready(self) -> bool:
        """Wait until it answers; False if it has ended instead."""
        while self.victim.alive():
            try:
                return self._client.get("/health").status_code == 200
            except httpx.HTTPError:
                time.sleep(0.01)
        return False

    def post(self, path: str, **body: Any) -> httpx.Response:
        """One request."""
        return self._client.post(path, json=body)

    def answers(self) -> dict[str, tuple[str, str]]:
        """The greedy text and the digest of every name."""
        listed = self._client.get("/store").json()["adapters"]
        found = {}
        for name in [one["name"] for one in listed]:
            answer = self.post("/v1/completions", model=name, **ASKED)
            text = answer.json()["choices"][0]["text"]
            found[name] = (text, answer.headers[DIGEST_HEADER])
        return found

    def close(self, number: int) -> Ended:
        """Send it a signal and wait."""
        self.victim.hit(number)
        self._client.close()
        return self.victim.end()


def changed(names: Names, draw: random.Random) -> tuple[str, dict[str, str], Names]:
    """A request that changes the names: its path, its body, and the names after it."""
    if names and draw.random() < 0.4:
        name = draw.choice(sorted(names))
        rest = {own: place for own, place in names.items() if own != name}
        return "/v1/unload_lora_adapter", {"lora_name": name}, rest
    name, place = draw.choice(["x", "y", *FOLDERS]), draw.choice(FOLDERS)
    body = {"lora_name": name, "lora_path": place}
    return "/v1/load_lora_adapter", body, {**names, name: place}


class Serve(Case):
    """The names are those before or those after the request that was under way."""

    name = "serve"
    meets = ("killed", "killed in a write", "SIGTERM", "Ctrl-C", "disk full", "no space", "no permission", "no memory")
    resume = ()

    def __init__(self, ground: Any) -> None:
        self.ground, self._number = ground, 0
        self.seconds = 1.5  # of changes
        self.possible: list[Names] = [{name: name for name in FOLDERS}]
        self._filled(ground.root / self.name / "whole")
        server = Server(self.command(ground.root / self.name / "whole"))
        assert server.ready(), server.victim.end().said
        self.reference = server.answers()
        assert server.close(15).code == 0

    def command(self, place: Path) -> list[object]:
        return ["serve", "--model", self.ground.model, "--store", place / "store"]

    def struck(
        self, disaster: Disaster, place: Path, more: Sequence[object], draw: random.Random, tally: Tally
    ) -> Ended:
        if not (place / "store").is_dir():
            self._filled(place)
            self.possible = [{name: name for name in FOLDERS}]
        server = Server(self.command(place))
        assert server.ready(), server.victim.end().said
        names, refused = self.possible[-1], list[str]()
        blow = threading.Thread(target=self._blow, args=(disaster, server, place, draw))
        blow.start()
        until = time.monotonic() + 2 * self.seconds
        self.possible = [names]
        while blow.is_alive() or time.monotonic() < until:
            path, body, after = changed(names, draw)
            self.possible = [names, after]
            try:
                answer = server.post(path, **body)
            except httpx.HTTPError:
                break  # it has ended
            names = after if answer.status_code == 200 else names
            refused += [] if answer.status_code == 200 else [answer.text]
            self.possible = [names]
        blow.join()
        for folder_ in (place, place / "store"):
            folder_.chmod(0o755)
        (place / "filler.partial").unlink(missing_ok=True)
        ended = server.close(9)
        tally.note(disaster.name, "befallen", "met alive", *(["said so"] if refused else []))
        tally.problems += [f"{disaster.name}: {one}" for one in refused if not _fair(one)]
        return ended

    def broken(self, place: Path) -> list[str]:
        """A new server knows the same names, and answers as ever."""
        found = read_names(place / "store")
        server = Server(self.command(place))
        if not server.ready():
            return [f"it does not start again: {server.victim.end().said}"]
        answers = server.answers()
        server.close(9)
        fits = [names for names in self.possible if set(names) == set(answers)]
        wanted = [{n: self.reference[place] for n, place in names.items()} for names in fits]
        if answers in wanted:
            self.possible = [fits[wanted.index(answers)]]
            return []
        self.possible = [{name: name for name in FOLDERS}]
        return [f"{found}: answers {answers}, not {wanted} of {self.possible}"]

    def goes_on(self, names: Sequence[str], place: Path, tally: Tally) -> None:
        store = place / "store"
        problems = [
            f"{name} was changed" for name in FOLDERS if folder.read(store / name).digest != self.reference[name][1]
        ]
        left = [one for one in leftovers(place) if "names.json" not in one]
        tally.problems += problems + left
        for name in names:
            tally.note(name, "resumed", *([] if problems else ["same bytes"]))

    def _filled(self, place: Path) -> None:
        for name in FOLDERS:
            for file in (folder.CONFIG, folder.TENSORS, folder.RECORD):
                (place / "store" / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(self.ground.adapters() / name / file, place / "store" / name / file)

    def _blow(self, disaster: Disaster, server: Server, place: Path, draw: random.Random) -> None:
        moments = random.Random(draw.random())
        disaster.strike(server.victim, place, moments.uniform(0, self.seconds), moments)


def _fair(refused: str) -> bool:
    """Return whether a refusal says why."""
    reasons = ("cannot write", "no adapter", "stop", "memory", "cannot be read")
    return any(reason in refused for reason in reasons)
