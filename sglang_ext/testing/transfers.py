"""A simulated transfer engine: real contents, virtual time, faults."""

import dataclasses
import random
from collections import deque

from sglang_ext.core.plan import Copies, Transfer, TransferKind
from sglang_ext.testing.pools import LAYERS, STALE, SimDevicePool, SimSlots
from sglang_ext.testing.shared_memory import SharedSlots

HostSlots = SimSlots | SharedSlots


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How long copies take, in steps of the scheduler, and how often they go wrong.

    Attributes:
        layer: mean time of one layer.
        slow: chance that a layer takes 30 times as long.
        fails: chance that a backup fails.
    """

    layer: float = 0.5
    slow: float = 0.05
    fails: float = 0.0


@dataclasses.dataclass(slots=True)
class _Step:
    """One layer of one transfer."""

    transfer: Transfer
    layer: int
    due: float


class SimLane:
    """Transfers of one direction on one rank: first in, first out, layer by layer."""

    def __init__(
        self, kind: TransferKind, device: SimDevicePool, host: HostSlots, window: HostSlots
    ) -> None:
        self._kind = kind
        self._device = device
        self._host = host
        self._host_window = window
        self._steps: deque[_Step] = deque()
        self._busy_until = 0.0
        self.submitted: deque[Transfer] = deque()
        self.failed: set[int] = set()
        self.ended = -1

    def submit(self, transfer: Transfer, now: float, pace: Pace, rng: random.Random) -> None:
        """Queue a transfer; its copies fall due at random times, one after another."""
        due = max(now, self._busy_until)
        for layer in range(LAYERS):
            cost = rng.expovariate(1.0 / pace.layer) * (30.0 if rng.random() < pace.slow else 1.0)
            due += cost
            self._steps.append(_Step(transfer, layer, due))
        self._busy_until = due
        self.submitted.append(transfer)
        if self._kind is TransferKind.BACKUP and rng.random() < pace.fails:
            self.failed.add(transfer.op)

    def run_until(self, now: float) -> None:
        """Execute what is due."""
        while self._steps and self._steps[0].due <= now:
            self._execute(self._steps.popleft())

    def wait_for(self, op: int, layer: int) -> None:
        """Execute everything up to ``layer`` of operation ``op``: a reader waits."""
        while self._steps:
            step = self._steps[0]
            if (step.transfer.op, step.layer) > (op, layer):
                return
            self._execute(self._steps.popleft())

    def drain(self) -> None:
        """Execute everything."""
        self.run_until(float("inf"))

    def _execute(self, step: _Step) -> None:
        transfer, layer = step.transfer, step.layer
        if not transfer.failed_here:
            self._copy(transfer.full, self._device.full, self._host, step)
            self._copy(transfer.window, self._device.window, self._host_window, step)
        if layer == LAYERS - 1:
            self.submitted.popleft()
            self.ended = transfer.op

    def _copy(self, copies: Copies, device: SimSlots, host: HostSlots, step: _Step) -> None:
        layer = step.layer
        if self._kind is TransferKind.LOAD:
            device.put(layer, copies.device, host.get(layer, copies.host))
        elif step.transfer.op in self.failed:  # a failed copy leaves anything behind
            host.put(layer, copies.host, STALE)
        else:
            host.put(layer, copies.host, device.get(layer, copies.device))
