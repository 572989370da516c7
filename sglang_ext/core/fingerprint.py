"""One number for the whole state of a table, to compare ranks."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.plan import TransferKind


def fingerprint(index: PrefixCache) -> int:
    """Digest (62 bits) of what decisions depend on.

    Host slots are left out: their numbers may differ between ranks after one of them
    failed to allocate, and no decision looks at them. O(rows).
    """
    table = index.table
    state = hashlib.blake2b(digest_size=8)
    scalars = [table.tick, table.n_rows, *(index.last_op(kind) for kind in TransferKind)]
    scalars += index.private_state()
    columns = (table.device, table.host, table.swa_device, table.swa_host)
    for column in columns:
        scalars += [column.n_present, column.n_locked]
    state.update(np.array(scalars, dtype=np.int64).tobytes())
    array: NDArray[Any]
    for array in (table.parent, table.depth, table.digest, table.tokens, table.generation):
        state.update(array.tobytes())
    marks = table.resume, table.resume_if_room
    for array in (table.age, table.swa_age, table.hits, table.children, *marks):
        state.update(array.tobytes())
    for array in (table.priority, table.forks):
        state.update(array.tobytes())
    for flags in (table.stored, table.window_stored):
        state.update(flags.tobytes())
    if table.is_learned:
        for array in (table.kind, table.used, table.stay):
            state.update(array.tobytes())
    kept = index.kept
    beyond = np.array(sorted(kept.beyond), dtype=np.int64)
    for array in (kept.ends, kept.uses, kept.below, beyond):
        state.update(array.tobytes())
    for column in columns:
        for array in (column.present, column.ready, column.locks):
            state.update(array.tobytes())
    for column in (table.device, table.swa_device):
        state.update(column.slots.tobytes())
    return int.from_bytes(state.digest(), "little") >> 2
