"""The report of an audit, as JSON and as a page."""

import functools
import json
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from loralab import atomic
from loralab.artefacts.audit.answers import Distance

PAGE, DATA = "audit.html", "audit.json"
AGREES, DIFFERS, NO_ANSWER, NOT_INSTALLED = "agrees", "differs", "no answer", "not installed"


@dataclass(frozen=True, kw_only=True)
class EngineVerdict:
    """The verdict on one engine.

    Attributes:
        verdict: "agrees", "differs", "no answer" (it is installed) or "not installed".
        precision: that it computed in.
        distance: from fp32 eager; None without an answer.
        allowed: what rounding explains.
        cause: of a difference the likeliest, as a word: "adapter_left_out", "scaled",
            "base_differs" or "unknown".
        factor: of the update that it seems to have used, where it is "scaled".
        detail: the same for people; why there is no answer; how to install it.
    """

    engine: str
    verdict: str
    precision: str = ""
    distance: Distance | None = None
    allowed: Distance | None = None
    cause: str = ""
    factor: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """Verdicts on every engine that was named.

    Attributes:
        without: distance of the base without the adapter from fp32 eager with it.
        honest: by precision, the distance of each other way of computing the same.
        margin: by which the largest of these was multiplied to give what is allowed.
        undecidable: the precisions whose rounding is as large as the adapter's whole effect.
    """

    adapter: str
    base: str
    precision: str
    prompts: int
    positions: int
    rows: str
    engines: tuple[EngineVerdict, ...]
    without: Distance
    honest: dict[str, dict[str, Distance]]
    margin: float
    undecidable: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def of(self, verdict: str) -> list[EngineVerdict]:
        """Return the engines with a verdict."""
        return [own for own in self.engines if own.verdict == verdict]

    @property
    def decided(self) -> bool:
        """Return whether somebody differs, or somebody agrees and all that are installed answered."""
        return bool(self.of(DIFFERS)) or (
            bool(self.of(AGREES)) and not self.of(NO_ANSWER) and not any(self.weak(own) for own in self.of(AGREES))
        )

    @property
    def passed(self) -> bool:
        """Return whether every engine that is installed agrees, by more than the adapter's weakness."""
        return self.decided and not self.of(DIFFERS)

    def weak(self, own: EngineVerdict) -> bool:
        """Return whether an engine would agree without the adapter, too."""
        return own.precision in self.undecidable

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and what follows from it."""
        return {"passed": self.passed, "decided": self.decided, **asdict(self)}

    def write(self, folder: Path) -> Path:
        """Write audit.json and audit.html into a folder; return the page.

        Raises:
            OutputError: it cannot be written.
        """
        with atomic.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        content = {**self.to_json(), "loralab": version("loralab"), "date": str(date.today())}
        atomic.write_file(folder / DATA, json.dumps(content, indent=2) + "\n")
        return atomic.write_file(folder / PAGE, self.page())

    def page(self) -> str:
        """Return the page; it needs nothing from anywhere."""
        return _templates().get_template("audit.html.j2").render(r=self, version=version("loralab"), today=date.today())


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loralab.artefacts.audit", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["small"] = lambda value: f"{value:.1e}"
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    return environment
