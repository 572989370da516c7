"""A server's metrics at several times."""

import itertools
import time
from collections.abc import Callable, Sequence

from sglang_ext.tools.scrape import Metrics, ScrapeError


class Observed:
    """What was exported, and when.

    Args:
        times: seconds since the first look.
        scrapes: as many, at least one.
    """

    def __init__(self, times: Sequence[float], scrapes: Sequence[Metrics]) -> None:
        self.times = list(times)
        self.scrapes = list(scrapes)

    @property
    def last(self) -> Metrics:
        """The newest."""
        return self.scrapes[-1]

    def lengths(self) -> list[float]:
        """Seconds of each interval."""
        return [end - start for start, end in itertools.pairwise(self.times)]

    def changes(self, name: str, **labels: str) -> list[float]:
        """How much a counter grew in each interval; a server that starts anew counts from 0."""
        totals = [scrape.total(name, **labels) for scrape in self.scrapes]
        return [
            after - before if after >= before else after
            for before, after in itertools.pairwise(totals)
        ]

    def values(self, name: str, **labels: str) -> list[float]:
        """A gauge at the end of each interval."""
        return [scrape.total(name, **labels) for scrape in self.scrapes[1:]]

    def change(self, name: str, **labels: str) -> float:
        """How much a counter grew in all."""
        return sum(self.changes(name, **labels))


def observe(
    look: Callable[[], Metrics], length_s: float, every_s: float
) -> tuple[Observed, ScrapeError | None]:
    """Look at a server for some time, at its begin and end and in between.

    Returns:
        What was seen, and what has ended it too early. An interrupt ends it too, as it was told.

    Raises:
        ScrapeError: the first look saw nothing.
    """
    times, scrapes = [0.0], [look()]
    began = time.monotonic()
    fault = None
    try:
        while (left := length_s - (time.monotonic() - began)) > 0:
            time.sleep(min(left, every_s))
            at = time.monotonic() - began
            scrapes.append(look())
            times.append(at)
    except ScrapeError as error:
        fault = error
    except KeyboardInterrupt:
        pass
    return Observed(times, scrapes), fault
