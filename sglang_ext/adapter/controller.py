"""The controller of the host tier: submits begun transfers, commits agreed ones."""

import logging
from typing import Any

import numpy as np
import torch

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.core.columns import Rows
from sglang_ext.core.index import CacheIndex
from sglang_ext.core.plan import Copies, Declined, Transfer, TransferKind
from sglang_ext.transfer.job import Job, Part, TransferEngine
from sglang_ext.transfer.layer_counter import LayerDoneCounter

logger = logging.getLogger(__name__)

FULL, WINDOW = 0, 1
"""Component numbers of the transfer engine."""
_NONE_FAILED = np.iinfo(np.int64).max


class HostTierController:
    """What SGLang calls ``cache_controller``.

    Attributes:
        load_fence_stream, write_fence_stream: set by the scheduler to the forward
            stream; transfers run behind what it holds when they are submitted.
        storage_backend, storage_backend_type: None, there is no storage tier.
        layer_done_counter: see ``transfer.layer_counter``.
    """

    def __init__(
        self,
        index: CacheIndex,
        engine: TransferEngine,
        counter: LayerDoneCounter,
        agreement: RankAgreement,
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
        self._committed = dict.fromkeys(TransferKind, -1)
        self._failed_backup: int | None = None

    # ---- submit --------------------------------------------------------------

    def queue_backup(self, rows: Rows) -> None:
        """Begin the backup of a path; it is submitted by the next ``submit_backups``."""
        self._queue(self._index.begin_backup(rows))

    def queue_load(self, rows: Rows) -> bool:
        """Begin the load of a matched path; False if it was declined."""
        return self._queue(self._index.begin_load(rows))

    def _queue(self, plan: Transfer | Declined | None) -> bool:
        if isinstance(plan, Transfer):
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
        parts = [
            part
            for component, copies in (
                (FULL, [t.full for t in transfers]),
                (WINDOW, [t.window for t in transfers]),
            )
            if (part := self._part(component, copies)) is not None
        ]
        return Job(transfers[-1].op, tuple(parts))

    def _part(self, component: int, copies: list[Copies]) -> Part | None:
        host = torch.cat([self._indices.tokens(c.host) for c in copies])
        device = torch.cat([self._indices.tokens(c.device) for c in copies])
        return Part(component, host, device) if len(host) else None

    # ---- commit --------------------------------------------------------------

    def commit_finished(self) -> None:
        """Commit what has ended on every rank, in operation order. One collective."""
        backed_up, failed = self._engine.backed_up()
        if failed is not None:
            self._failed_backup = failed
        backed_up, loaded, failed = self._agreement.minimum(
            [
                backed_up,
                self._engine.loaded(),
                _NONE_FAILED if self._failed_backup is None else self._failed_backup,
            ]
        )
        self._commit_backups(backed_up, failed)
        for op in self._newly(TransferKind.LOAD, loaded):
            self._index.commit_load(op)

    def _commit_backups(self, last: int, failed: int) -> None:
        """Commit backups up to ``last``; those up to ``failed`` as failed.

        A failed job may cover several operations, and jobs before it may not be
        committed yet. At worst a page that was copied is copied again.
        """
        for op in self._newly(TransferKind.BACKUP, last):
            self._index.commit_backup(op, ok=failed == _NONE_FAILED or op > failed)
        if self._failed_backup is not None and last >= self._failed_backup:
            logger.warning("a backup of KV pages to the host failed (operation %d)", failed)
            self._failed_backup = None

    def _newly(self, kind: TransferKind, last: int) -> range:
        first = self._committed[kind] + 1
        self._committed[kind] = max(last, self._committed[kind])
        return range(first, last + 1)

    def wait_for_backups(self) -> bool:
        """Wait until nothing is in flight and commit it; the last resort before
        running out of device memory. False if nothing was in flight.

        Every rank holds the same table and therefore comes here at the same point.
        """
        if not any(self._index.pending.values()):
            return False
        self.submit_backups()
        self._engine.drain()
        self.commit_finished()
        return True

    def reset(self) -> None:
        """Let transfers end and forget them; for a flush, before the index is reset."""
        self.submit_backups()
        self._engine.drain()
        self._engine.backed_up()
        self._engine.loaded()
        self._queued = {kind: [] for kind in TransferKind}
        self._committed = {kind: self._index.last_op(kind) for kind in TransferKind}
        self._failed_backup = None
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Let transfers end and release the engine."""
        self._engine.close()
