"""Transfers that were begun and have not ended."""

from sglang_ext.core.plan import Copies, Hold, Transfer, TransferKind
from sglang_ext.core.table.columns import Rows


class TransferLog:
    """Numbers transfers, and has those in flight.

    Attributes:
        pending: those in flight by direction and number, in the order in which they were begun.
    """

    def __init__(self) -> None:
        # numbers go on across a flush: they identify transfers for good
        self._next_op = dict.fromkeys(TransferKind, 0)
        self.pending: dict[TransferKind, dict[int, Transfer]] = {}
        self.clear()

    def clear(self) -> None:
        """Nothing is in flight."""
        self.pending = {kind: {} for kind in TransferKind}

    def last_op(self, kind: TransferKind) -> int:
        """Number of the last transfer begun in a direction, -1 before the first."""
        return self._next_op[kind] - 1

    def begin(
        self,
        kind: TransferKind,
        full: Copies,
        window: Copies,
        hold: Hold,
        path: Rows,
        *,
        stops: tuple[int, ...] = (),
        spare: tuple[int, ...] = (),
        failed_here: bool = False,
    ) -> Transfer:
        """Note a transfer; see ``Transfer`` for what it has."""
        op = self._next_op[kind]
        self._next_op[kind] = op + 1
        transfer = Transfer(op, kind, full, window, hold, path, stops, spare, failed_here)
        self.pending[kind][op] = transfer
        return transfer

    def end(self, kind: TransferKind, op: int) -> Transfer:
        """A transfer ends."""
        return self.pending[kind].pop(op)
