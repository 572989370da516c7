"""What a transfer engine is asked to copy, and how it reports."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

MOST_ENDED = 256
"""Jobs that have ended and are kept for whoever asks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Pages of one pool to copy: of layers of one shape that have the same pages.

    Attributes:
        pool: its number.
        host, device: int64; pages of the engine's allocators, pair by pair.
    """

    pool: int
    host: NDArray[np.int64]
    device: NDArray[np.int64]


class PreparedCopies(Protocol):
    """The copies of one job, on the current stream."""

    def backup(self) -> None:
        """Copy device to host, all layers of all pools."""
        ...

    def load_layer(self, pool: int, layer: int) -> None:
        """Copy host to device, one layer of a pool; nothing if the job has none of it."""
        ...


class PageCopies(Protocol):
    """Who moves the bytes."""

    def prepare(self, parts: Sequence[Part]) -> PreparedCopies:
        """Get ready to copy: what needs doing once for a job and not for each layer."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One submission: consecutive operations that end, or fail, together; at most one part of each
    pool."""

    ops: range
    parts: tuple[Part, ...]

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """(component, pages of the engine) of what is copied. The first two pools are the target's,
        one for each component; those of drafts come along with the same pages."""
        return tuple((part.pool, len(part.host)) for part in self.parts if part.pool < 2)


Schedule = Sequence[Sequence[tuple[int, int]]]
"""For each layer of the model (pool, layer of the pool) of what is loaded before its gate opens;
nothing for a layer without KV."""


class LayerGate(Protocol):
    """Per-layer completion of one load. Readers of a layer wait at its gate."""

    def wait(self, layer: int) -> None:
        """Order the caller's reads of ``layer`` (global number) behind its load."""
        ...

    def is_open(self) -> bool:
        """Whether every layer has been loaded."""
        ...


class Ended(NamedTuple):
    """A job that has ended.

    Attributes:
        seconds: that its copies took, without what they waited for.
        slots: see ``Job.slots``.
    """

    seconds: float
    slots: tuple[tuple[int, int], ...]


class EndedJobs:
    """Jobs of a lane that have ended, until somebody takes them."""

    def __init__(self) -> None:
        self._jobs: deque[Ended] = deque(maxlen=MOST_ENDED)

    def add(self, seconds: float, slots: tuple[tuple[int, int], ...]) -> None:
        """A job has ended."""
        self._jobs.append(Ended(seconds, slots))

    def take(self) -> list[Ended]:
        """Those since the last call."""
        if not self._jobs:
            return []
        taken = list(self._jobs)
        self._jobs.clear()
        return taken


class TransferEngine(Protocol):
    """Two lanes, device to host and host to device. Each is first in, first out.

    Called from one thread. Submission never waits for a copy.
    """

    def submit_backup(self, job: Job, fence: object | None) -> None:
        """Copy device to host, after the work that ``fence`` (a stream) holds now."""
        ...

    def submit_load(self, job: Job, fence: object | None) -> LayerGate:
        """Copy host to device layer by layer, after the work that ``fence`` holds now."""
        ...

    def backed_up(self) -> tuple[int, range]:
        """(last op that ended, in order; those of them that failed).

        Failed ones are reported once.
        """
        ...

    def loaded(self) -> int:
        """Last load op that ended, in order.

        Raises:
            RuntimeError: a load failed. Its reader has failed too: the request was
                already running on it.
        """
        ...

    def take_ended(self) -> tuple[list[Ended], list[Ended]]:
        """Jobs that have ended since the last call: (backups, loads). The oldest ones beyond
        MOST_ENDED are forgotten."""
        ...

    def drain(self) -> None:
        """Wait until everything submitted has ended."""
        ...

    def close(self) -> None:
        """Drain and release threads or streams."""
        ...
