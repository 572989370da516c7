"""Which transfers have ended: what a rank reports, what all ranks commit."""

from collections.abc import Sequence

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.plan import Transfer, TransferKind

BACKUPS_A_STEP = 64
"""Backups committed in one step at most: each has its own element in the report."""
ENTRIES = 2 + BACKUPS_A_STEP
"""Of a report."""


class Ledger:
    """Commits transfers in operation order, as all ranks agree.

    A rank reports the last operations that have ended there, and for each backup
    that is next to be committed whether it is good. The element-wise minimum over
    ranks is what all ranks apply: an operation commits when it has ended everywhere,
    and as failed if it failed anywhere.
    """

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        self.reset()

    def reset(self) -> None:
        """Nothing is in flight, and everything begun so far is over."""
        self._committed = {kind: self._index.last_op(kind) for kind in TransferKind}
        self._failed: set[int] = set()

    def begun(self, transfer: Transfer) -> None:
        """Take note of a transfer that this rank cannot execute."""
        if transfer.failed_here:
            self._failed.add(transfer.op)

    def failed(self, ops: range) -> None:
        """Backups ``ops`` have ended here without success."""
        # what failed before a flush is reported after it
        committed = self._committed[TransferKind.BACKUP]
        self._failed.update(op for op in ops if op > committed)

    def report(self, backed_up: int, loaded: int) -> list[int]:
        """This rank's view, of the same length on every rank.

        Args:
            backed_up: last backup that has ended here, in order.
            loaded: last load that has ended here, in order.
        """
        good = [1] * BACKUPS_A_STEP
        first = self._committed[TransferKind.BACKUP] + 1
        for op in self._failed:
            if 0 <= op - first < BACKUPS_A_STEP:
                good[op - first] = 0
        return [backed_up, loaded, *good]

    def commit(self, agreed: Sequence[int]) -> list[int]:
        """Apply the minimum of all reports; returns the backups that failed."""
        backed_up, loaded, *good = agreed
        first = self._committed[TransferKind.BACKUP] + 1
        last = min(backed_up, first + BACKUPS_A_STEP - 1)
        failed = []
        for op in range(first, last + 1):
            ok = bool(good[op - first])
            self._index.commit_backup(op, ok=ok)
            self._failed.discard(op)
            if not ok:
                failed.append(op)
        self._committed[TransferKind.BACKUP] = max(last, first - 1)
        first = self._committed[TransferKind.LOAD] + 1
        for op in range(first, loaded + 1):
            self._index.commit_load(op)
        self._committed[TransferKind.LOAD] = max(loaded, first - 1)
        return failed
