"""Prefixes that requests hold."""

from typing import TYPE_CHECKING

from sglang_ext.core.plan import Hold
from sglang_ext.core.table.columns import Rows

if TYPE_CHECKING:
    from sglang_ext.core.cache import PrefixCache


class Locks:
    """Locks by the number that is on their receipt: nothing is walked to find out what one
    covers."""

    def __init__(self, index: "PrefixCache") -> None:
        self._index = index
        self._held: dict[int, Hold] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Hold:
        return self._held[number]

    def __setitem__(self, number: int, hold: Hold) -> None:
        """A lock covers something else from now on."""
        self._held[number] = hold

    def take(self, rows: Rows) -> int:
        """Lock a path; returns the number of the lock."""
        number = self._next
        self._next += 1
        self._held[number] = self._index.hold(rows)
        return number

    def release(self, number: int) -> None:
        """Release a lock.

        Raises:
            KeyError: there is none of that number.
        """
        self._held.pop(number).release()

    def clear(self) -> None:
        """Forget all locks; the table is another one."""
        self._held.clear()
