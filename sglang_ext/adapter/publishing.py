"""Publishes a little in each scheduler step, so that no step waits for all of it."""

from collections.abc import Callable, Iterable, Iterator

Update = Callable[[], object]
"""Sets, adds to or observes one value of one metric: one to three microseconds."""
Look = Callable[[], Iterable[Update]]
"""Sees what has changed of a kind; the updates are found as they are asked for."""
A_STEP = 2
"""Updates that a step makes."""
PATIENCE = 64
"""After so many steps of a round a step makes twice as many, and so on: more may come than it
makes."""


class Publishing:
    """Rounds of looks and of the updates that they find. A step makes one look or some updates."""

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = tuple(looks)
        self._to_come = iter(self._looks)
        self._updates: Iterator[Update] | None = None
        self._steps = 0

    def step(self) -> bool:
        """The next part of a round; returns whether it was the last one."""
        self._steps += 1
        if self._updates is None:
            look = next(self._to_come, None)
            if look is None:
                self._begin()
                return True
            self._updates = iter(look())
            return False
        for _ in range(A_STEP << self._steps // PATIENCE):
            update = next(self._updates, None)
            if update is None:
                self._updates = None
                break
            update()
        return False

    def whole(self) -> None:
        """Publish what has changed up to now, and what a round has found already."""
        for update in self._updates or ():
            update()
        for look in self._looks:
            for update in look():
                update()
        self._begin()

    def _begin(self) -> None:
        self._to_come, self._updates, self._steps = iter(self._looks), None, 0
