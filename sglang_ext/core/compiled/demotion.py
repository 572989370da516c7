"""``Demotion`` with compiled loops."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import scans
from sglang_ext.core.device.demotion import Demotion
from sglang_ext.core.table.columns import Rows, SlotColumn

_NO_HOLDS = np.empty(0, dtype=np.int16)


class CompiledDemotion(Demotion):
    """Looks at what eviction takes next; see ``Demotion``."""

    def evictable(
        self, device: SlotColumn, host: SlotColumn, holds: NDArray[np.int16] | int
    ) -> tuple[Rows, int]:
        """See Demotion."""
        rows = np.empty(device.n_evictable, dtype=np.int64)
        each, by_row = (holds, _NO_HOLDS) if isinstance(holds, int) else (-1, holds)
        found, copying = scans.evictable(
            device.present, device.locks, host.present, host.ready, by_row, each, rows
        )
        assert found == len(rows), "more or fewer pages can be evicted than counted"
        return rows, copying

    def windows_to_save(
        self, worth: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See Demotion."""
        table = self._table
        end_of = np.full(table.capacity, -1, dtype=np.int64)
        lost = np.zeros(table.capacity, dtype=np.bool_)
        scans.windows_to_save(
            table.parent,
            worth,
            self._kept.ends,
            table.swa_device.ready,
            table.swa_device.present,
            table.swa_host.present,
            table.geometry.window_pages,
            end_of,
            lost,
        )
        return end_of, lost
