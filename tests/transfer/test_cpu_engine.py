"""The CPU transfer engine is really asynchronous, ordered, and gated by layer."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang_ext.transfer.cpu import CopyFaults, CpuTransferEngine
from sglang_ext.transfer.job import MOST_ENDED, EndedJobs, Job, Part
from sglang_ext.transfer.layer_counter import LayerDoneCounter

LAYERS = 3
TIMEOUT_S = 120.0


class TensorCopies:
    """One component on two tensors (layers, tokens); each layer can be held back."""

    def __init__(self) -> None:
        self.device = torch.zeros(LAYERS, 8)
        self.host = torch.zeros(LAYERS, 8)
        self.may_load = [threading.Event() for _ in range(LAYERS)]
        self.may_back_up = threading.Event()
        self.broken = False

    def open(self) -> None:
        for event in (*self.may_load, self.may_back_up):
            event.set()

    def prepare(self, parts: Sequence[Part]) -> "PreparedTensorCopies":
        return PreparedTensorCopies(self, parts)


class PreparedTensorCopies:
    def __init__(self, copies: TensorCopies, parts: Sequence[Part]) -> None:
        self.copies = copies
        self.parts = parts

    def backup(self) -> None:
        copies = self.copies
        assert copies.may_back_up.wait(TIMEOUT_S)
        if copies.broken:
            raise OSError("broken")
        for part in self.parts:
            copies.host[:, part.host] = copies.device[:, part.device]

    def load_layer(self, component: int, layer: int) -> None:
        copies = self.copies
        assert copies.may_load[layer].wait(TIMEOUT_S)
        if copies.broken:
            raise OSError("broken")
        for part in self.parts:
            copies.device[layer, part.device] = copies.host[layer, part.host]


def engine_and_copies() -> tuple[CpuTransferEngine, TensorCopies]:
    copies = TensorCopies()
    return CpuTransferEngine(copies, [[(0, layer)] for layer in range(LAYERS)]), copies


def job(op: int, host: list[int], device: list[int]) -> Job:
    return Job(range(op, op + 1), (Part(0, np.array(host), np.array(device)),))


def test_a_backup_is_not_done_when_it_was_submitted() -> None:
    engine, copies = engine_and_copies()
    copies.device[:] = 7
    engine.submit_backup(job(0, [1, 2], [3, 4]), None)
    assert engine.backed_up() == (-1, range(0))
    assert not copies.host.any()
    copies.open()
    engine.drain()
    assert engine.backed_up() == (0, range(0))
    assert copies.host[:, [1, 2]].eq(7).all()
    engine.close()


def test_a_reader_waits_for_its_layer_and_only_for_its_layer() -> None:
    engine, copies = engine_and_copies()
    copies.host[:] = torch.arange(1, LAYERS + 1)[:, None]
    counter = LayerDoneCounter(LAYERS)
    number = counter.open_gate(engine.submit_load(job(0, [0], [5]), None))
    counter.set_consumer(number)
    read: list[float] = []

    def forward() -> None:
        for layer in range(LAYERS):
            counter.wait_until(layer)
            read.append(float(copies.device[layer, 5]))

    copies.may_load[0].set()
    reader = threading.Thread(target=forward)
    reader.start()
    while len(read) < 1:
        assert reader.is_alive()
    assert read == [1.0]  # layer 1 is held back, and so is its reader
    copies.open()
    reader.join(TIMEOUT_S)
    assert read == [1.0, 2.0, 3.0]
    engine.close()


def test_a_reader_that_does_not_wait_reads_the_old_contents() -> None:
    """The check above has teeth: without the gate the delayed layer is stale."""
    engine, copies = engine_and_copies()
    copies.host[:] = 9
    counter = LayerDoneCounter(LAYERS)
    counter.open_gate(engine.submit_load(job(0, [0], [5]), None))
    counter.set_consumer(-1)  # a batch that was told it has nothing to wait for
    counter.wait_until(2)
    assert copies.device[2, 5] == 0
    copies.open()
    engine.close()
    assert copies.device[2, 5] == 9


def test_operations_end_in_order_and_a_failure_is_reported_once() -> None:
    engine, copies = engine_and_copies()
    copies.open()
    engine.submit_backup(job(0, [0], [0]), None)
    engine.drain()
    copies.broken = True
    engine.submit_backup(job(3, [1], [1]), None)
    engine.drain()
    copies.broken = False
    engine.submit_backup(job(4, [2], [2]), None)
    engine.drain()
    assert engine.backed_up() == (3, range(3, 4))
    assert engine.backed_up() == (4, range(0))
    engine.close()


def test_a_failed_load_stops_its_readers_and_the_scheduler() -> None:
    engine, copies = engine_and_copies()
    copies.open()
    copies.broken = True
    gate = engine.submit_load(job(0, [0], [0]), None)
    with pytest.raises(RuntimeError, match="load of KV pages"):
        gate.wait(1)
    engine.drain()
    with pytest.raises(RuntimeError, match="load of KV pages"):
        engine.loaded()
    engine.close()


def test_the_counter_forgets_old_gates_but_not_closed_ones() -> None:
    engine, copies = engine_and_copies()
    counter = LayerDoneCounter(LAYERS)
    first = counter.open_gate(engine.submit_load(job(0, [0], [0]), None))
    for op in range(1, 40):
        counter.open_gate(engine.submit_load(job(op, [0], [0]), None))
    assert first in counter._gates
    copies.open()
    engine.drain()
    counter.open_gate(engine.submit_load(job(40, [0], [0]), None))
    assert first not in counter._gates
    assert len(counter._gates) <= 17
    engine.close()


def test_a_copy_may_be_reported_late() -> None:
    copies = TensorCopies()
    layers = [[(0, layer)] for layer in range(LAYERS)]
    engine = CpuTransferEngine(copies, layers, CopyFaults(report_after_s=0.2))
    copies.device[:] = 7
    copies.open()
    for op in range(2):
        engine.submit_backup(job(op, [op], [op]), None)
    engine._backups._tasks[-1].ended.wait(TIMEOUT_S)
    assert copies.host[:, [0, 1]].eq(7).all(), "a late report held up a copy"
    engine.drain()
    assert engine.backed_up() == (1, range(0))
    engine.close()


def test_how_long_copies_took_is_told_once() -> None:
    """Without what they waited for: the second one waits for the first."""
    engine, copies = engine_and_copies()
    nothing = np.zeros(0, dtype=np.int64)
    for op in range(2):
        engine.submit_backup(Job(range(op, op + 1), (Part(0, nothing, nothing),)), None)
    assert engine.take_ended() == ([], [])
    copies.open()
    some = np.arange(3, dtype=np.int64)
    engine.submit_load(Job(range(1), (Part(0, nothing, nothing), Part(1, some, some))), None)
    engine.drain()
    assert engine.take_ended() == ([], []), "nobody has asked what ended"
    assert engine.backed_up()[0] == 1
    assert engine.loaded() == 0
    backups, loads = engine.take_ended()
    assert [job.slots for job in (*backups, *loads)] == [((0, 0),), ((0, 0),), ((0, 0), (1, 3))]
    assert all(0.0 <= job.seconds < TIMEOUT_S for job in (*backups, *loads))
    assert engine.take_ended() == ([], [])
    engine.close()


def test_ended_jobs_that_nobody_takes_are_bounded() -> None:
    ended = EndedJobs()
    for number in range(3 * MOST_ENDED):
        ended.add(number, ())
    assert [job.seconds for job in ended.take()] == list(range(2 * MOST_ENDED, 3 * MOST_ENDED))
