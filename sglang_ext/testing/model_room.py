"""What room on the host may not cost: copies that are needed before what it is for."""

from collections.abc import Callable

import numpy as np

from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.host.room import Claim, Freed
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.table.table import PageTable
from sglang_ext.testing.watch import require


def watch(
    table: PageTable,
    kept: KeptWindows,
    make: Callable[..., Freed],
    space: HostSpace,
    pages: int,
    claim: Claim,
) -> Freed:
    """Copies of what is on the device too stay if they are older than the claim: two that are
    as old would take each other's place forever. But those that no kept window needs any more,
    and windows that others make up for, go at any age."""
    older = table.age <= claim.age
    copies = np.flatnonzero(older & table.device.ready & table.host.ready)
    ends = np.flatnonzero(older & kept.ends & table.resume)
    windows = [row for row in ends.tolist() if _is_on_device(table, row)]
    freed = make(space, pages, claim)
    needed = copies[kept.below[copies] > 0]
    require(bool(table.host.present[needed].all()), "room cost a copy of an older page")
    require(bool(kept.ends[windows].all()), "room cost a copy of an older window")
    return freed


def _is_on_device(table: PageTable, end: int) -> bool:
    window = table.path(end)[-table.geometry.window_pages :]
    return bool(table.swa_device.ready[window].all())
