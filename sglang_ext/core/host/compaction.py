"""Free extents in a memory that both components share: pages move into holes of others."""

import numpy as np

from sglang_ext.core.host.arena import Pages
from sglang_ext.core.host.tier import SharedMemory
from sglang_ext.core.table.columns import Rows, SlotColumn, Slots


class Compaction:
    """Moves pages of one component.

    Args:
        component: its number in the arena.
        column: its copies on the host.
    """

    def __init__(self, shared: SharedMemory, component: int, column: SlotColumn) -> None:
        self._arena, self._memory = shared.arena, shared.memory
        self._component, self._column = component, column
        # of each page the row that had it last
        self._rows = np.zeros(shared.arena.shape.pages(component), dtype=np.int32)

    def note(self, rows: Rows, slots: Slots) -> None:
        """Rows have copies in these slots now."""
        self._rows[self._arena.pages(slots)] = rows

    @property
    def missing(self) -> int:
        """Pages to drop so that an extent can be vacated."""
        arena, component = self._arena, self._component
        return max(1, arena.pages_per_extent(component) - arena.holes(component))

    def vacate(self) -> int:
        """Set an extent free; returns how many pages have moved, 0 if that is not possible."""
        arena, component, column = self._arena, self._component, self._column
        if arena.holes(component) < arena.pages_per_extent(component):
            return 0
        chosen = arena.to_vacate(component, self._are_movable)
        if len(chosen) == 0:
            return 0
        rows = self._rows[chosen].astype(np.int64)
        order = rows.argsort()
        rows, chosen = rows[order], chosen[order]
        places = arena.slots(arena.move(component, chosen))
        self._memory.move(component, arena.slots(chosen), places)
        column.slots[rows] = places
        self.note(rows, places)
        return len(chosen)

    def _are_movable(self, pages: Pages) -> bool:
        """Whether rows have these pages, and no transfer reads or writes them."""
        column, rows = self._column, self._rows[pages]
        movable = column.ready[rows] & (column.locks[rows] == 0)
        return bool((movable & (self._arena.pages(column.slots[rows]) == pages)).all())
