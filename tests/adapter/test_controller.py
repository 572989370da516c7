"""Commits: in operation order, agreed over ranks, failures on all ranks alike."""

import numpy as np
import pytest

from sglang_ext.adapter.controller import HostTierController
from sglang_ext.core.moves.ledger import BACKUPS_A_STEP
from sglang_ext.core.plan import TransferKind
from sglang_ext.testing.engine import SimEngine
from sglang_ext.transfer.job import Job
from sglang_ext.transfer.layer_counter import LayerDoneCounter
from tests.core.test_index import engine_with, prompt


class ManualTransfers:
    """A transfer engine whose jobs end when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.ended = -1
        self.failed = range(0)

    def submit_backup(self, job: Job, fence: object | None) -> None:
        self.jobs.append(job)

    def backed_up(self) -> tuple[int, range]:
        failed, self.failed = self.failed, range(0)
        return self.ended, failed

    def loaded(self) -> int:
        return -1

    def drain(self) -> None:
        if self.jobs:
            self.ended = self.jobs[-1].ops[-1]


class OtherRank:
    """Agreement with one other rank: [backed up, loaded, good, good, ...]."""

    def __init__(self) -> None:
        self.values = [10**9, 10**9, *[1] * BACKUPS_A_STEP]
        self.calls = 0

    def minimum(self, values: list[int]) -> list[int]:
        self.calls += 1
        return [min(pair) for pair in zip(values, self.values, strict=True)]


@pytest.fixture
def rig() -> tuple[SimEngine, HostTierController, ManualTransfers, OtherRank]:
    engine = engine_with(device_pages=32, device_window_pages=32)
    transfers, other = ManualTransfers(), OtherRank()
    controller = HostTierController(engine.index, transfers, LayerDoneCounter(2), other)
    return engine, controller, transfers, other


def back_up(engine: SimEngine, controller: HostTierController, seed: int) -> None:
    tier, engine.index.host_tier = engine.index.host_tier, None
    request = engine.start(prompt(2, seed))
    assert request is not None
    engine.compute(request, 100)
    engine.index.host_tier = tier
    rows = engine.index.table.lookup(prompt(2, seed)[:-1].reshape(-1, 16), None)
    controller.queue_backup(rows)
    engine.abort(request)


def ready_pages(engine: SimEngine) -> int:
    return int(np.count_nonzero(engine.index.table.host.ready))


def test_nothing_is_committed_that_another_rank_has_not_copied(rig) -> None:  # noqa: ANN001
    engine, controller, transfers, other = rig
    for seed in (1, 2):
        back_up(engine, controller, seed)
        controller.submit_backups()
    transfers.drain()
    other.values[0] = 0  # the other rank has ended operation 0 only
    controller.commit_finished()
    assert ready_pages(engine) == 2
    assert list(engine.index.pending[TransferKind.BACKUP]) == [1]
    other.values[0] = 1
    controller.commit_finished()
    assert ready_pages(engine) == 4


def test_every_step_enters_the_collective_once_even_with_nothing_to_do(rig) -> None:  # noqa: ANN001
    _, controller, _, other = rig
    for step in range(5):
        controller.commit_finished()
        assert other.calls == step + 1


def test_a_failure_of_another_rank_fails_the_operation_here(rig) -> None:  # noqa: ANN001
    engine, controller, transfers, other = rig
    back_up(engine, controller, 1)
    controller.submit_backups()
    transfers.drain()
    other.values[:3] = [0, 10**9, 0]
    controller.commit_finished()
    assert ready_pages(engine) == 0
    assert engine.index.counters.failed_transfers == 1
    assert engine.host.used == 0


def test_a_failure_here_is_remembered_until_all_ranks_have_got_there(rig) -> None:  # noqa: ANN001
    engine, controller, transfers, other = rig
    back_up(engine, controller, 1)
    controller.submit_backups()
    transfers.drain()
    transfers.failed = range(1)
    other.values[0] = -1
    controller.commit_finished()
    assert list(engine.index.pending[TransferKind.BACKUP]) == [0]
    other.values[0] = 0
    controller.commit_finished()
    assert ready_pages(engine) == 0
    back_up(engine, controller, 1)
    controller.submit_backups()
    transfers.drain()
    other.values[0] = 1
    controller.commit_finished()
    assert ready_pages(engine) == 2


def test_operation_numbers_survive_a_flush(rig) -> None:  # noqa: ANN001
    engine, controller, transfers, _ = rig
    back_up(engine, controller, 1)
    controller.reset()
    engine.index.reset()
    for pool in (engine.host, engine.host_window, engine.device):
        pool.clear()
    back_up(engine, controller, 2)
    controller.submit_backups()
    transfers.drain()
    controller.commit_finished()
    assert ready_pages(engine) == 2


def test_no_step_waits_for_a_backup(rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    """Room is made of pages that a backup holds, and that backup is not published."""
    engine, controller, transfers, _ = rig

    def wait() -> None:
        raise AssertionError("a scheduler step waited for copies")

    monkeypatch.setattr(transfers, "drain", wait)
    back_up(engine, controller, 1)
    controller.submit_backups()
    assert engine.index.evict_device(2, 2) == (0, 0)
    assert engine.index.evict_device(2, 2, abandon_backups=True) == (2, 2)
    controller.commit_finished()
    assert engine.host.used == 2, "the copy may still write there"
    transfers.ended = 0
    controller.commit_finished()
    assert engine.host.used == 0
    assert ready_pages(engine) == 0
    engine.check_idle()


def test_a_failed_allocation_is_no_copy_and_a_failed_operation(rig) -> None:  # noqa: ANN001
    engine, controller, transfers, _ = rig
    engine.host.allocations_to_fail = 1
    back_up(engine, controller, 1)
    controller.submit_backups()
    assert [job.parts for job in transfers.jobs] == [()]
    transfers.ended = 0
    controller.commit_finished()
    assert ready_pages(engine) == 0
    assert engine.index.counters.failed_transfers == 1
    engine.check_idle()
