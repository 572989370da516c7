"""Times of scheduler steps, for measurements."""

import time
from pathlib import Path


class StepTrace:
    """Writes one line for each step: its seconds, those spent in the cache's part of
    it, and how many backups were in flight.

    A step is the time between two calls of ``check_hicache_events``; steps of an idle
    scheduler, which spins, are left out.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._last: float | None = None

    def step(self, start: float, in_flight: int, *, idle: bool) -> None:
        """End of the cache's part of a step that began at ``start`` (perf_counter)."""
        now = time.perf_counter()
        if self._last is not None and not idle:
            self._file.write(f"{start - self._last:.6f} {now - start:.6f} {in_flight}\n")
        self._last = start
