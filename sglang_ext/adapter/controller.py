"""The controller of the host tier: submits begun transfers, commits agreed ones."""

import logging
import time
from typing import Any

import numpy as np

from sglang_ext.adapter.pipeline import Stages
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.adapter.storage_tier import StorageTier
from sglang_ext.adapter.transfer_lag import TransferLag
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.fingerprint import fingerprint
from sglang_ext.core.moves.ledger import ENTRIES, Ledger
from sglang_ext.core.plan import Copies, Declined, Transfer, TransferKind
from sglang_ext.core.table.columns import Rows
from sglang_ext.transfer.job import Ended, Job, Part, TransferEngine
from sglang_ext.transfer.layer_counter import LayerDoneCounter

logger = logging.getLogger(__name__)

Pools = tuple[tuple[int, ...], tuple[int, ...]]
"""Numbers of the pools of the transfer engine that have a page of full attention, and of those
that have one of the windows."""
_MOST_SECONDS_TO_SAVE = 10.0
"""The engine kills a scheduler that has not ended 15 seconds after it was told to."""
SECONDS_TO_SETTLE = 10.0
"""So long a call of the engine that needs an idle server waits for what is in flight."""
_A_MOMENT = 0.001


class HostTierController:
    """What SGLang calls ``cache_controller``.

    Attributes:
        load_fence_stream, write_fence_stream: set by the scheduler to the forward
            stream; transfers run behind what it holds when they are submitted.
        storage_backend, storage_backend_type: the engine's backend and its name, None without
            a storage tier.
        layer_done_counter: see ``transfer.layer_counter``.
        lag: who measures how long transfers take, None for nobody.

    Args:
        pools: where pages of each component are.
        agreement: of the ranks that a call of an operator reaches in the same moment: all, or those
            of one stage.
        stages: of a pipeline; None if there are none.
        compare_ranks: check in every step that all ranks hold the same table. O(rows).
    """

    def __init__(
        self,
        index: PrefixCache,
        engine: TransferEngine,
        counter: LayerDoneCounter,
        agreement: RankAgreement,
        *,
        pools: Pools = ((0,), (1,)),
        stages: Stages | None = None,
        compare_ranks: bool = False,
    ) -> None:
        self.load_fence_stream: Any = None
        self.write_fence_stream: Any = None
        self.storage_backend: Any = None
        self.storage_backend_type: str | None = None
        self._storage: StorageTier | None = None
        self.layer_done_counter = counter
        self._index = index
        self._engine = engine
        self._pools = pools
        self._agreement = agreement
        self._stages = stages
        self._queued: dict[TransferKind, list[Transfer]] = {kind: [] for kind in TransferKind}
        self._ledger = Ledger(index)
        self._compare_ranks = compare_ranks
        self._failures = 0
        self.lag: TransferLag | None = None

    # ---- submit --------------------------------------------------------------

    def queue_backup(self, rows: Rows) -> None:
        """Begin the backup of a path that a request has extended, if the write policy
        says so; it is submitted by the next ``submit_backups``."""
        self._queue(self._index.begin_backup(rows))

    def queue_demotions(self) -> None:
        """Begin backups of what the device evicts next; once a step."""
        for plan in self._index.demote_ahead():
            self._queue(plan)

    def queue_pinned(self, end: int) -> Transfer | Declined | None:
        """Begin to copy what is missing of a pinned prefix; see ``Pins.copy``."""
        plan = self._index.pins.copy(end)
        self._queue(plan)
        return plan

    def queue_load(self, rows: Rows) -> bool:
        """Begin the load of a matched path; False if it was declined."""
        return self._queue(self._index.begin_load(rows))

    def _queue(self, plan: Transfer | Declined | None) -> bool:
        if isinstance(plan, Transfer):
            self._ledger.begun(plan)
            if self.lag is not None:
                self.lag.begun(plan.kind, plan.op)
            self._queued[plan.kind].append(plan)
            return True
        return False

    def submit_backups(self) -> None:
        """Submit all queued backups as one job."""
        if job := self._take_job(TransferKind.BACKUP):
            self._engine.submit_backup(job, self.write_fence_stream)

    def submit_loads(self) -> int:
        """Submit all queued loads as one job.

        Returns:
            The number that the next batch waits for, -1 if there was nothing to load.
        """
        job = self._take_job(TransferKind.LOAD)
        if job is None:
            return -1
        gate = self._engine.submit_load(job, self.load_fence_stream)
        return self.layer_done_counter.open_gate(gate)

    def _take_job(self, kind: TransferKind) -> Job | None:
        if not (transfers := self._queued[kind]):
            return None
        self._queued[kind] = []
        copied = [t for t in transfers if not (t.failed_here or t.abandoned)]
        full, windows = self._pools
        parts = _parts(full, [t.full for t in copied])
        parts += _parts(windows, [t.window for t in copied])
        return Job(range(transfers[0].op, transfers[-1].op + 1), tuple(parts))

    # ---- commit --------------------------------------------------------------

    def commit_finished(self) -> None:
        """Commit what has ended on every rank. One collective."""
        report, mark = self._agreed()
        if self._stages is not None:
            report = self._stages.follow(report, mark, lambda: self._agreed()[0])
        self._commit(report)

    def _agreed(self) -> tuple[list[int], int]:
        """What has ended on every rank that a call reaches in the same moment, and a mark that
        tells tables apart, 0 if nobody compares them. A collective."""
        backed_up, failed = self._engine.backed_up()
        self._ledger.failed(failed)
        report = self._ledger.report(backed_up, self._engine.loaded())
        if self._storage is not None:
            report += self._storage.report()
        if not self._compare_ranks:
            return self._agreement.minimum(report), 0
        mark = fingerprint(self._index)
        *report, low, high = self._agreement.minimum([*report, mark, -mark])
        assert low == -high, "ranks hold different tables"
        return report, mark

    def _commit(self, report: list[int]) -> None:
        if failed_ops := self._ledger.commit(report[:ENTRIES]):
            self._log_failures(failed_ops)
        if self.lag is not None:
            self.lag.look()
        if self._storage is not None:
            self._storage.commit(report[ENTRIES:])

    def _log_failures(self, ops: list[int]) -> None:
        """One line each time the number of failures has doubled."""
        before = self._failures
        self._failures += len(ops)
        if self._failures.bit_length() > before.bit_length():
            logger.warning(
                "backups of KV pages to the host that failed on some rank: %d so far, the last "
                "is operation %d",
                self._failures,
                ops[-1],
            )

    def take_ended(self) -> tuple[list[Ended], list[Ended]]:
        """Jobs that have ended since the last call: (backups, loads)."""
        return self._engine.take_ended()

    # ---- storage -------------------------------------------------------------

    def all_ranks(self, done: bool) -> bool:
        """Whether something is done on every rank that a call has reached. A collective."""
        return bool(self._agreement.minimum([int(done)])[0])

    def attach_storage(self, storage: StorageTier, name: str, backend: Any) -> None:
        """There is a storage tier from now on."""
        self._storage = storage
        self.storage_backend, self.storage_backend_type = backend, name

    def detach_storage(self) -> None:
        """There is no storage tier any more."""
        self._storage = self.storage_backend = self.storage_backend_type = None

    def save_everything(self) -> None:
        """At shutdown: what the write policy keeps goes to storage, the most recently used
        first, as far as there is time. The other ranks do the same, each for itself."""
        if self._storage is None:
            return
        deadline = time.monotonic() + _MOST_SECONDS_TO_SAVE
        tried: set[int] = set()
        while time.monotonic() < deadline:
            self.submit_backups()
            backed_up, failed = self._engine.backed_up()
            self._ledger.failed(failed)
            self._ledger.commit(self._ledger.report(backed_up, self._engine.loaded()))
            busy = self._storage.save_alone()
            if self._index.pending[TransferKind.BACKUP] or busy:
                time.sleep(0.001)
                continue
            more = self._index.backups.save_more(tried)
            for plan in more:
                self._queue(plan)
            if not more and not self._storage.save_alone():
                break
        counters = self._index.counters
        logger.info(
            "sglang-ext: %d pages and %d window pages were written to storage in all",
            counters.persisted_pages,
            counters.persisted_window_pages,
        )

    # ---- life cycle ----------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether anything is in flight or promised to storage; the same on every rank."""
        return any(self._index.pending.values()) or (
            self._storage is not None and self._storage.is_busy
        )

    def settle(self, *, give_up: bool) -> None:
        """Let what is in flight end, for a bounded time; nothing runs that would begin more.
        Collectives, equally many on every rank.

        Args:
            give_up: what storage has not done by then is not done at all.
        """
        self.submit_backups()
        self.submit_loads()
        self._wait_until_done()
        if give_up and self.is_busy and self._storage is not None:
            self._storage.give_up()
            self._wait_until_done()
            self._storage.go_on()

    def _wait_until_done(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_SETTLE
        while self.is_busy and self.all_ranks(time.monotonic() < deadline):
            time.sleep(_A_MOMENT)
            self._commit(self._agreed()[0])

    def reset(self) -> None:
        """Let transfers end and forget them; for a flush, before the index is reset."""
        if self._storage is not None:
            self._storage.reset()
        self.submit_backups()
        self.submit_loads()
        self._engine.drain()
        self._engine.backed_up()
        self._engine.loaded()
        self._ledger.reset()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Let transfers end and release the engine and the storage."""
        self._engine.close()
        if self._storage is not None:
            self._storage.close()


def _parts(pools: tuple[int, ...], copies: list[Copies]) -> list[Part]:
    """The same pages of each of some pools."""
    if not copies:
        return []
    host = np.concatenate([c.host.reshape(-1) for c in copies]).astype(np.int64)
    device = np.concatenate([c.device.reshape(-1) for c in copies]).astype(np.int64)
    return [Part(pool, host, device) for pool in pools] if len(host) else []
