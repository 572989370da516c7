"""Copies between the tiers that have ended when they are submitted, and counts of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.bench.call_times import CallTimes
from sglang_ext.transfer.job import Job, PageCopies

FULL, WINDOW = KINDS = "full", "window"
"""Kinds of KV, by number of the component."""


def _none() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


@dataclasses.dataclass
class Moved:
    """Tokens whose KV has gone each way, by kind."""

    to_host: dict[str, int] = dataclasses.field(default_factory=_none)
    to_device: dict[str, int] = dataclasses.field(default_factory=_none)


class CopiesAtOnce:
    """TransferEngine (see ``transfer.job``) whose copies have ended when they are submitted, as
    those of stock's controller on a CPU.

    Args:
        page: tokens.
        copies, layers: what the engine that it stands for gets.
    """

    def __init__(
        self,
        moved: Moved,
        times: CallTimes,
        page: int,
        copies: PageCopies,
        layers: Sequence[tuple[int, int] | None],
        *_: Any,
    ) -> None:
        self._moved = moved
        self._times = times
        self._page = page
        self._copies = copies
        self._layers = [layer for layer in layers if layer is not None]
        self._backed_up = self._loaded = -1

    def submit_backup(self, job: Job, fence: object | None) -> None:
        """See TransferEngine."""
        self._count(self._moved.to_host, job)
        with self._times.copying():
            self._copies.prepare(job.parts).backup()
        self._backed_up = job.ops[-1]

    def submit_load(self, job: Job, fence: object | None) -> "OpenGate":
        """See TransferEngine."""
        self._count(self._moved.to_device, job)
        with self._times.copying():
            copies = self._copies.prepare(job.parts)
            for layer in self._layers:
                copies.load_layer(*layer)
        self._loaded = job.ops[-1]
        return OpenGate()

    def _count(self, moved: dict[str, int], job: Job) -> None:
        for part in job.parts:
            moved[KINDS[part.component]] += len(part.host) * self._page

    def backed_up(self) -> tuple[int, range]:
        """See TransferEngine."""
        return self._backed_up, range(0)

    def loaded(self) -> int:
        """See TransferEngine."""
        return self._loaded

    def take_durations(self) -> tuple[list[float], list[float]]:
        """See TransferEngine."""
        return [], []

    def drain(self) -> None:
        """See TransferEngine."""

    def close(self) -> None:
        """See TransferEngine."""


class OpenGate:
    """LayerGate (see ``transfer.job``) of a load that has ended."""

    def wait(self, layer: int) -> None:
        """See LayerGate."""

    def is_open(self) -> bool:
        """See LayerGate."""
        return True
