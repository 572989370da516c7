"""Copies between the tiers that have ended when they are submitted, and counts of them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from launch.bench.call_times import CallTimes
from sglang_ext.transfer.job import Ended, Job, PageCopies, Schedule

FULL, WINDOW = KINDS = "full", "window"
"""Kinds of KV, by number of the pool."""


class Copies:
    """What is copied between the tiers, counted; its time is kept apart.

    Attributes:
        to_host, to_device: tokens whose KV has gone that way, by kind.
    """

    def __init__(self, times: CallTimes) -> None:
        self._times = times
        self.clear()

    def clear(self) -> None:
        """Forget what was copied."""
        self.to_host = dict.fromkeys(KINDS, 0)
        self.to_device = dict.fromkeys(KINDS, 0)

    @contextlib.contextmanager
    def made(self, way: dict[str, int], tokens: Mapping[str, int]) -> Iterator[None]:
        """So many tokens of each kind are copied one of the two ways in this with-block."""
        for kind, count in tokens.items():
            way[kind] += count
        with self._times.copying():
            yield


class CopiesAtOnce:
    """TransferEngine (see ``transfer.job``) whose copies have ended when they are submitted, as
    those of stock's controller on a CPU.

    Args:
        counted: gets to know of every copy.
        page: tokens.
        copies, layers: what the engine that it stands for gets.
    """

    def __init__(
        self,
        counted: Copies,
        page: int,
        copies: PageCopies,
        layers: Schedule,
        *_: Any,
    ) -> None:
        self._counted = counted
        self._page = page
        self._copies = copies
        self._layers = [layer for loaded in layers for layer in loaded]
        self._backed_up = self._loaded = -1

    def submit_backup(self, job: Job, fence: object | None) -> None:
        """See TransferEngine."""
        with self._counted.made(self._counted.to_host, self._tokens(job)):
            self._copies.prepare(job.parts).backup()
        self._backed_up = job.ops[-1]

    def submit_load(self, job: Job, fence: object | None) -> "OpenGate":
        """See TransferEngine."""
        with self._counted.made(self._counted.to_device, self._tokens(job)):
            copies = self._copies.prepare(job.parts)
            for layer in self._layers:
                copies.load_layer(*layer)
        self._loaded = job.ops[-1]
        return OpenGate()

    def _tokens(self, job: Job) -> dict[str, int]:
        # further pools of a component go with its first
        parts = [part for part in job.parts if part.pool < len(KINDS)]
        return {KINDS[part.pool]: len(part.host) * self._page for part in parts}

    def backed_up(self) -> tuple[int, range]:
        """See TransferEngine."""
        return self._backed_up, range(0)

    def loaded(self) -> int:
        """See TransferEngine."""
        return self._loaded

    def take_ended(self) -> tuple[list[Ended], list[Ended]]:
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
