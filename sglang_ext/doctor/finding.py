"""What a check has found."""

import dataclasses
import enum


class Verdict(enum.Enum):
    """Of one check."""

    OK = "ok"
    NOTE = "note"
    """The server starts; something could be better, or could not be checked."""
    FAULT = "FAULT"
    """The server does not start, or does not do what is asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        found: what is there; the cause, if it is a fault.
        advice: what to do; empty where there is nothing to do.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""

    def line(self) -> str:
        """For a reader."""
        said = f"{self.found}; {self.advice}" if self.advice else self.found
        return f"{self.verdict.value:<5}  {self.check:<19}  {said}"


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Verdict.OK, found)


def note(check: str, found: str, advice: str = "") -> Finding:
    """Something to know."""
    return Finding(check, Verdict.NOTE, found, advice)


def fault(check: str, found: str, advice: str) -> Finding:
    """Something to mend."""
    return Finding(check, Verdict.FAULT, found, advice)
