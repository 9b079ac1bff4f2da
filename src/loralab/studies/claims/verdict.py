"""An estimate with its interval -> holds, refuted or undecided, by the rule that was registered (form.py)."""

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from loralab.studies.claims.form import ABOVE, BELOW, WITHIN

Verdict = Literal["holds", "refuted", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Value of a reading, its 95 % interval and standard error; all zero wide where it is exact.

    `at_edge` is whether a best learning rate lies at the edge of what was tried: the value is a bound then.
    """

    value: float
    low: float
    high: float
    error: float
    at_edge: bool = False

    @property
    def half(self) -> float:
        """Return half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def turned(self) -> "Estimate":
        """Return the estimate of the opposite."""
        return Estimate(value=-self.value, low=-self.high, high=-self.low, error=self.error, at_edge=self.at_edge)


def decide(found: Estimate, direction: str, threshold: float, margin: float) -> Verdict:
    """Return the verdict; what has no interval, or lies at the edge of what was tried, is undecided."""
    if found.at_edge or not (math.isfinite(found.low) and math.isfinite(found.high)):
        return "undecided"
    if direction == BELOW:
        return decide(found.turned, ABOVE, -threshold, margin)
    low, high = found.low - threshold, found.high - threshold
    if direction == WITHIN:
        if -margin <= low and high <= margin:
            return "holds"
        return "refuted" if low > margin or high < -margin else "undecided"
    if high < margin:  # first: an effect that is shown, and shown to be too small to matter
        return "refuted"
    return "holds" if low > 0 else "undecided"


def power(found: Estimate, direction: str, margin: float) -> float:
    """Return the chance that this design decides an effect of the size of the margin, with the noise it has met.

    For a claim of a direction: that an effect as large as the margin is shown. For one of equality:
    that no difference at all is shown to lie within the margin.
    """
    if not math.isfinite(found.half):
        return 0.0
    if not found.error:
        return float(found.half <= margin)
    reach = (margin - found.half) / found.error
    if direction == WITHIN:
        return max(0.0, 2 * float(stats.norm.cdf(reach)) - 1)
    return float(stats.norm.cdf(reach))


def weakest(found: list[Estimate], direction: str, threshold: float, margin: float) -> Estimate:
    """Return the part on which a claim of several parts stands: it holds where each does, and falls with one.

    One that refutes comes first; then the one whose interval has the least room to the rule.
    """
    order = ("refuted", "undecided", "holds")

    def strength(one: Estimate) -> tuple[int, float]:
        low, high = one.low - threshold, one.high - threshold
        room = {ABOVE: low, BELOW: -high}.get(direction, -max(abs(low), abs(high)))
        return order.index(decide(one, direction, threshold, margin)), room if math.isfinite(room) else -math.inf

    return min(found, key=strength)
