"""Transfers on CUDA: one stream for each direction, events for completion.

The same plans as on the CPU. What copies is behind ``PageCopies``; this
module only orders it.
"""

import dataclasses
from collections import deque
from typing import Any

import torch

from sglang_ext.transfer.job import Ended, EndedJobs, Job, PageCopies, PreparedCopies, Schedule


class EventLayerGate:
    """An event for each layer, recorded on the load stream."""

    def __init__(self, num_layers: int) -> None:
        self._events = [torch.cuda.Event() for _ in range(num_layers)]

    def record(self, layer: int) -> None:
        """Mark the end of the copies of ``layer`` on the current (load) stream."""
        self._events[layer].record()

    def wait(self, layer: int) -> None:
        """Make the current stream wait for ``layer``; the host does not block."""
        torch.cuda.current_stream().wait_event(self._events[layer])

    def is_open(self) -> bool:
        """Whether every layer has been loaded."""
        return bool(self._events[-1].query())


@dataclasses.dataclass(frozen=True, slots=True)
class _InFlight:
    """A job on its stream."""

    start: torch.cuda.Event
    done: torch.cuda.Event
    job: Job
    copies: PreparedCopies


class CudaTransferEngine:
    """TransferEngine on two CUDA streams. Arguments as for CpuTransferEngine.

    Args:
        timed: measure how long copies take, on their streams.
    """

    def __init__(
        self,
        copies: PageCopies,
        layers: Schedule,
        *,
        timed: bool = False,
    ) -> None:
        self._timed = timed
        self._ended = (EndedJobs(), EndedJobs())
        self._copies = copies
        self._layers = layers
        self._backup_stream = torch.cuda.Stream()
        self._load_stream = torch.cuda.Stream()
        # indices live with the prepared copies, or on the stream that reads them
        self._backups: deque[_InFlight] = deque()
        self._loads: deque[_InFlight] = deque()
        self._backed_up = -1
        self._loaded = -1

    def submit_backup(self, job: Job, fence: Any) -> None:
        """Copy on the backup stream, behind the forward pass that wrote the pages."""
        _order_behind(self._backup_stream, fence)
        with torch.cuda.stream(self._backup_stream):
            copies = self._copies.prepare(job.parts)
            start = self._mark()
            copies.backup()
            done = self._mark()
        self._backups.append(_InFlight(start, done, job, copies))

    def submit_load(self, job: Job, fence: Any) -> EventLayerGate:
        """Copy on the load stream, behind readers of the slots' former contents."""
        gate = EventLayerGate(len(self._layers))
        _order_behind(self._load_stream, fence)
        with torch.cuda.stream(self._load_stream):
            copies = self._copies.prepare(job.parts)
            start = self._mark()
            for number, loaded in enumerate(self._layers):
                for layer in loaded:
                    copies.load_layer(*layer)
                gate.record(number)
            done = self._mark()
        self._loads.append(_InFlight(start, done, job, copies))
        return gate

    def backed_up(self) -> tuple[int, range]:
        """See TransferEngine. A failed CUDA copy raises in ``query``: it is fatal."""
        self._backed_up = self._last_done(self._backups, 0, self._backed_up)
        return self._backed_up, range(0)

    def loaded(self) -> int:
        """See TransferEngine."""
        self._loaded = self._last_done(self._loads, 1, self._loaded)
        return self._loaded

    def take_ended(self) -> tuple[list[Ended], list[Ended]]:
        """See TransferEngine; nothing unless ``timed``."""
        backups, loads = self._ended
        return backups.take(), loads.take()

    def _mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=self._timed)
        event.record()
        return event

    def _last_done(self, jobs: deque[_InFlight], lane: int, last: int) -> int:
        while jobs and jobs[0].done.query():
            ended = jobs.popleft()
            last = ended.job.ops[-1]
            if self._timed:
                seconds = ended.start.elapsed_time(ended.done) / 1000.0
                self._ended[lane].add(seconds, ended.job.slots)
        return last

    def drain(self) -> None:
        """See TransferEngine."""
        self._load_stream.synchronize()
        self._backup_stream.synchronize()

    def close(self) -> None:
        """See TransferEngine."""
        self.drain()


def _order_behind(stream: torch.cuda.Stream, fence: Any) -> None:
    # the caller's stream wrote the pages or will read them, the fence ran the forward pass
    stream.wait_stream(torch.cuda.current_stream())
    if fence is not None:
        stream.wait_stream(fence)
