"""CPU time of a cache's calls, by what they are for; copies of bytes apart."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(slots=True)
class Kind:
    """Calls for one purpose.

    Attributes:
        seconds: CPU time of all of them.
        largest: CPU time of the longest one.
        largest_in: number of the request that made it.
    """

    calls: int = 0
    seconds: float = 0.0
    largest: float = 0.0
    largest_in: int = -1

    def clear(self) -> None:
        """Forget the calls so far."""
        self.calls, self.seconds, self.largest, self.largest_in = 0, 0.0, 0.0, -1


class CallTimes:
    """Watches methods of objects; a call inside another one is part of that one.

    Attributes:
        copies: CPU seconds of copies, which are taken off from the calls that make them.
        request: number of the request that runs.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}
        self.copies = 0.0
        self.request = -1
        self._inside = False

    def clear(self) -> None:
        """Forget what was measured."""
        for kind in self.kinds.values():
            kind.clear()
        self.copies, self.request = 0.0, -1

    def watch(self, owner: Any, kinds: Mapping[str, Sequence[str]]) -> None:
        """Measure the methods of an object, given by kind; those that it has."""
        for kind, names in kinds.items():
            for name in names:
                if hasattr(owner, name):
                    setattr(owner, name, self._measured(getattr(owner, name), kind))

    def _measured(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        kind = self.kinds.setdefault(name, Kind())

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside, start = True, self._now()
            try:
                return method(*args, **kwargs)
            finally:
                spent, self._inside = self._now() - start, False
                kind.calls += 1
                kind.seconds += spent
                if spent > kind.largest:
                    kind.largest, kind.largest_in = spent, self.request

        return call

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copies of bytes, for the length of a with-block."""
        start = time.process_time()
        try:
            yield
        finally:
            self.copies += time.process_time() - start

    def _now(self) -> float:
        """CPU seconds without copies."""
        return time.process_time() - self.copies

    @property
    def seconds(self) -> float:
        """CPU time of all calls."""
        return sum(kind.seconds for kind in self.kinds.values())

    def as_dict(self, requests: int) -> dict[str, dict[str, float]]:
        """By kind: calls, milliseconds per request, and of the longest call."""
        return {
            name: {
                "calls": kind.calls,
                "ms_per_request": kind.seconds * 1e3 / max(1, requests),
                "largest_ms": kind.largest * 1e3,
                "largest_in_request": kind.largest_in,
            }
            for name, kind in self.kinds.items()
        }
