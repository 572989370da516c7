"""Transfers on the CPU: one worker thread for each direction.

Real asynchrony: a copy is not done when it was submitted, and a reader that does
not wait at its layer gate reads what was in the slot before.
"""

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from sglang_ext.transfer.job import Ended, EndedJobs, Job, PageCopies, Schedule


class ThreadLayerGate:
    """A flag for each layer, set by the worker thread."""

    def __init__(self, num_layers: int) -> None:
        self._loaded = [threading.Event() for _ in range(num_layers)]
        self._error: BaseException | None = None

    def open(self, layer: int) -> None:
        """Let readers of ``layer`` pass."""
        self._loaded[layer].set()

    def fail(self, error: BaseException) -> None:
        """Let every reader pass into an exception."""
        self._error = error
        for event in self._loaded:
            event.set()

    def wait(self, layer: int) -> None:
        """Block until ``layer`` is loaded.

        Raises:
            RuntimeError: the load failed.
        """
        self._loaded[layer].wait()
        if self._error is not None:
            raise RuntimeError("load of KV pages from the host failed") from self._error

    def is_open(self) -> bool:
        """Whether every layer has been loaded."""
        return all(event.is_set() for event in self._loaded)


@dataclasses.dataclass(frozen=True, slots=True)
class CopyFaults:
    """Trouble to make, for tests.

    Attributes:
        report_after_s: seconds between the end of a copy and its report.
        slowdown: a backup takes this many times as long as its copy.
    """

    report_after_s: float = 0.0
    slowdown: float = 1.0


class _Task:
    """One job in a lane."""

    def __init__(self, job: Job, run: Callable[[], None]) -> None:
        self.job = job
        self.ops = job.ops
        self.run = run
        self.ended = threading.Event()
        self.ended_at = 0.0
        self.seconds = 0.0
        self.error: BaseException | None = None


class _Lane:
    """A worker thread and the tasks it has not reported yet, oldest first.

    ``faults`` make it slow, or late to report, for tests.
    """

    def __init__(self, name: str, faults: CopyFaults) -> None:
        self._faults = faults
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._tasks: deque[_Task] = deque()
        self._last_op = -1
        self.ended = EndedJobs()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: _Task) -> None:
        self._tasks.append(task)
        self._inbox.put(task)

    def poll(self) -> tuple[int, _Task | None]:
        """Last op ended in order, and the failed task the poll stopped at, if any."""
        while self._tasks and self._is_over(self._tasks[0]):
            task = self._tasks.popleft()
            self._last_op = task.ops[-1]
            if task.error is not None:
                return self._last_op, task
            self.ended.add(task.seconds, task.job.slots)
        return self._last_op, None

    def _is_over(self, task: _Task) -> bool:
        if not task.ended.is_set():
            return False
        late = self._faults.report_after_s
        return late == 0.0 or time.monotonic() >= task.ended_at + late

    def drain(self) -> None:
        for task in self._tasks:
            task.ended.wait()
        if self._tasks and self._faults.report_after_s:
            time.sleep(self._faults.report_after_s)

    def close(self) -> None:
        self.drain()
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        # A thread that runs torch ops gets an OpenMP team of its own, whose spinning
        # members slow the forward pass. The setting is per thread.
        torch.set_num_threads(1)
        while (task := self._inbox.get()) is not None:
            start = time.monotonic()
            try:
                task.run()
            except Exception as error:  # the root of a worker thread
                task.error = error
            if self._faults.slowdown > 1.0:
                time.sleep((self._faults.slowdown - 1.0) * (time.monotonic() - start))
            task.ended_at = time.monotonic()
            task.seconds = task.ended_at - start
            task.ended.set()


class CpuTransferEngine:
    """TransferEngine for tensors in CPU memory.

    Args:
        copies: who moves the bytes.
        layers: what is loaded for each layer of the model.
        faults: trouble to make, for tests.
    """

    def __init__(
        self,
        copies: PageCopies,
        layers: Schedule,
        faults: CopyFaults | None = None,
    ) -> None:
        self._copies = copies
        self._layers = layers
        faults = faults or CopyFaults()
        self._backups = _Lane("kv-backup", faults)
        # readers wait for loads: those are reported late, but never slow
        self._loads = _Lane("kv-load", dataclasses.replace(faults, slowdown=1.0))

    def submit_backup(self, job: Job, fence: object | None) -> None:
        """Copy on the backup thread. The forward pass on a CPU has ended by now."""

        def run() -> None:
            self._copies.prepare(job.parts).backup()

        self._backups.submit(_Task(job, run))

    def submit_load(self, job: Job, fence: object | None) -> ThreadLayerGate:
        """Copy on the load thread, opening the gate layer by layer."""
        gate = ThreadLayerGate(len(self._layers))

        def run() -> None:
            try:
                copies = self._copies.prepare(job.parts)
                for number, loaded in enumerate(self._layers):
                    for layer in loaded:
                        copies.load_layer(*layer)
                    gate.open(number)
            except BaseException as error:
                gate.fail(error)
                raise

        self._loads.submit(_Task(job, run))
        return gate

    def backed_up(self) -> tuple[int, range]:
        """See TransferEngine."""
        last_op, failed = self._backups.poll()
        return last_op, failed.ops if failed else range(0)

    def loaded(self) -> int:
        """See TransferEngine."""
        last_op, failed = self._loads.poll()
        if failed is not None:
            raise RuntimeError("load of KV pages from the host failed") from failed.error
        return last_op

    def take_ended(self) -> tuple[list[Ended], list[Ended]]:
        """See TransferEngine."""
        return self._backups.ended.take(), self._loads.ended.take()

    def drain(self) -> None:
        """See TransferEngine."""
        self._loads.drain()
        self._backups.drain()

    def close(self) -> None:
        """See TransferEngine."""
        self._loads.close()
        self._backups.close()
