"""The parts of the answer on low-rank updates; each experiment gives one (spectra, dimension, directions, intruders)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import MARGIN, finding
from loralab.studies.message import Chart, Message, Table
from loralab.studies.study import Finding

SHARE_MARGIN = MARGIN / 100  # of shares of directions
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of the answer that one experiment gives; empty where it was not run.

    Attributes:
        sentences: of the answer itself.
        changed: of the blank on what fine-tuning changes.
    """

    sentences: Sequence[Message] = ()
    changed: Sequence[Message] = ()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Chart] = ()


def compared(change: Contrast, a: Message, b: Message, span: Message) -> Finding:
    """Say how two numbers of all modules differ."""
    return finding(Message(f"lowrank.{change.verdict}", a=a, b=b, span=span), change)
