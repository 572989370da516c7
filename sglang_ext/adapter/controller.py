"""The controller of the host tier: submits begun transfers, commits agreed ones."""

import logging
from typing import Any

import torch

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.core.columns import Rows
from sglang_ext.core.fingerprint import fingerprint
from sglang_ext.core.index import CacheIndex
from sglang_ext.core.ledger import Ledger
from sglang_ext.core.plan import Copies, Declined, Transfer, TransferKind
from sglang_ext.transfer.job import Job, Part, TransferEngine
from sglang_ext.transfer.layer_counter import LayerDoneCounter

logger = logging.getLogger(__name__)

FULL, WINDOW = 0, 1
"""Component numbers of the transfer engine."""


class HostTierController:
    """What SGLang calls ``cache_controller``.

    Attributes:
        load_fence_stream, write_fence_stream: set by the scheduler to the forward
            stream; transfers run behind what it holds when they are submitted.
        storage_backend, storage_backend_type: None, there is no storage tier.
        layer_done_counter: see ``transfer.layer_counter``.

    Args:
        compare_ranks: check in every step that all ranks hold the same table. O(rows).
    """

    def __init__(
        self,
        index: CacheIndex,
        engine: TransferEngine,
        counter: LayerDoneCounter,
        agreement: RankAgreement,
        *,
        compare_ranks: bool = False,
    ) -> None:
        self.load_fence_stream: Any = None
        self.write_fence_stream: Any = None
        self.storage_backend = None
        self.storage_backend_type = None
        self.layer_done_counter = counter
        self._index = index
        self._engine = engine
        self._agreement = agreement
        self._indices = SlotIndices(index.geometry)
        self._queued: dict[TransferKind, list[Transfer]] = {kind: [] for kind in TransferKind}
        self._ledger = Ledger(index)
        self._compare_ranks = compare_ranks
        self._failures = 0

    # ---- submit --------------------------------------------------------------

    def queue_backup(self, rows: Rows) -> None:
        """Begin the backup of a path that a request has extended, if the write policy
        says so; it is submitted by the next ``submit_backups``."""
        self._queue(self._index.begin_backup(rows))

    def queue_demotions(self) -> None:
        """Begin backups of what the device evicts next; once a step."""
        for plan in self._index.demote_ahead():
            self._queue(plan)

    def queue_load(self, rows: Rows) -> bool:
        """Begin the load of a matched path; False if it was declined."""
        return self._queue(self._index.begin_load(rows))

    def _queue(self, plan: Transfer | Declined | None) -> bool:
        if isinstance(plan, Transfer):
            self._ledger.begun(plan)
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
        transfers, self._queued[kind] = self._queued[kind], []
        if not transfers:
            return None
        copied = [t for t in transfers if not (t.failed_here or t.abandoned)]
        parts = [
            part
            for component, copies in (
                (FULL, [t.full for t in copied]),
                (WINDOW, [t.window for t in copied]),
            )
            if (part := self._part(component, copies)) is not None
        ]
        return Job(range(transfers[0].op, transfers[-1].op + 1), tuple(parts))

    def _part(self, component: int, copies: list[Copies]) -> Part | None:
        if not copies:
            return None
        host = torch.cat([self._indices.tokens(c.host) for c in copies])
        device = torch.cat([self._indices.tokens(c.device) for c in copies])
        return Part(component, host, device) if len(host) else None

    # ---- commit --------------------------------------------------------------

    def commit_finished(self) -> None:
        """Commit what has ended on every rank. One collective."""
        backed_up, failed = self._engine.backed_up()
        self._ledger.failed(failed)
        report = self._ledger.report(backed_up, self._engine.loaded())
        if self._compare_ranks:
            mark = fingerprint(self._index)
            *report, low, high = self._agreement.minimum([*report, mark, -mark])
            assert low == -high, "ranks hold different tables"
        else:
            report = self._agreement.minimum(report)
        if failed_ops := self._ledger.commit(report):
            self._log_failures(failed_ops)

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

    def reset(self) -> None:
        """Let transfers end and forget them; for a flush, before the index is reset."""
        self.submit_backups()
        self.submit_loads()
        self._engine.drain()
        self._engine.backed_up()
        self._engine.loaded()
        self._ledger.reset()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Let transfers end and release the engine."""
        self._engine.close()
