"""What a part has to show: a figure beside its bound, and whether it holds."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One claim.

    Attributes:
        what: the claim, for a reader.
        value: what was measured; None if it was not.
        bound: the last value that holds.
        at_least: whether lower values miss the bound, rather than higher ones.
        timed: whether it is about speed, which a CPU says nothing of.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool = False
    timed: bool = False

    def holds(self) -> bool:
        """Whether the value is there and keeps the bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def verdict(self, device: str) -> str:
        """``held``, ``MISSED``, ``NOT MEASURED``; ``not judged`` of a speed without a GPU."""
        if self.timed and device == "cpu":
            return "not judged"
        if self.value is None:
            return "NOT MEASURED"
        return "held" if self.holds() else "MISSED"


def judged(checks: Sequence[Check], device: str) -> list[dict[str, Any]]:
    """The checks for a report."""
    return [
        {
            "what": check.what,
            "value": check.value,
            "bound": f"{'>=' if check.at_least else '<='} {check.bound:g}",
            "verdict": check.verdict(device),
        }
        for check in checks
    ]


def passes(found: Sequence[dict[str, Any]]) -> bool:
    """Whether something was judged and everything that was has held."""
    verdicts = {row["verdict"] for row in found} - {"not judged"}
    return verdicts == {"held"}


def lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The checks for a reader."""
    return [
        f"{row['verdict']:13}{'-' if row['value'] is None else format(row['value'], '.3g'):>9}"
        f"  {row['bound']:10}{row['what']}"
        for row in found
    ]
