"""Checks of the whole cache while the server is idle."""

from typing import TYPE_CHECKING

from sglang_ext.core import invariants
from sglang_ext.core.cache import PrefixCache

if TYPE_CHECKING:
    from sglang_ext.adapter.host_arena import ArenaMemory


class IdleCheck:
    """Runs all checks of a state once: the engine asks in every spin of its idle loop."""

    def __init__(self, index: PrefixCache) -> None:
        self._index = index
        self._checked: tuple[int, ...] | None = None

    def run(self, locks: int, memory: "ArenaMemory | None") -> None:
        """Check, unless nothing has happened since the last time.

        Args:
            locks: prefixes that requests hold.
            memory: of the host tier.

        Raises:
            AssertionError: the cache contradicts itself, or a lock is left.
        """
        table = self._index.table
        state = (table.tick, table.n_rows, table.device.n_locked, table.host.n_present)
        if state == self._checked:
            return
        invariants.check_idle(self._index)
        assert not locks, f"{locks} locks are left at idle"
        if memory is not None:
            self._check_host_pools(memory)
        self._checked = state

    def _check_host_pools(self, memory: "ArenaMemory") -> None:
        table, arena = self._index.table, memory.arena
        # a model without full-attention layers has the last component only
        columns = (table.host, table.swa_host)[-len(arena.shape.page_bytes) :]
        for component, column in enumerate(columns):
            used = arena.taken(component)
            assert used == column.n_present, f"host pages: {used} used, {column.n_present} known"
