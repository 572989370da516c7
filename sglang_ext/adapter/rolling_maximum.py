"""The largest of the last while."""


class RollingMaximum:
    """Forgets what is older than a span; within it, two halves are kept.

    Args:
        seconds: a value counts for at least half as long, and at most as long.
    """

    def __init__(self, seconds: float) -> None:
        self._half = seconds / 2
        self._before = self._now = 0
        self._begun = 0.0

    def note(self, value: int, now: float) -> None:
        """There is a value."""
        self._forget(now)
        self._now = max(self._now, value)

    def value(self, now: float) -> int:
        """The largest, 0 without any."""
        self._forget(now)
        return max(self._before, self._now)

    def _forget(self, now: float) -> None:
        if now < self._begun + self._half:
            return
        self._before = self._now if now < self._begun + 2 * self._half else 0
        self._now, self._begun = 0, now
