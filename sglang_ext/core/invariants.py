"""Every invariant of the index, in one place. O(rows); called by tests and at idle."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.candidates import Kind
from sglang_ext.core.compiled.constants import FREE, PAD, TICK_SHIFT
from sglang_ext.core.compiled.siblings import BEGIN
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.columns import ABSENT, SlotColumn
from sglang_ext.core.table.table import STORED, STORING, PageTable


class InvariantError(AssertionError):
    """The table contradicts itself."""


def check(index: PrefixCache) -> None:
    """Raise InvariantError with the first contradiction found."""
    table = index.table
    for name in ("device", "host", "swa_device", "swa_host"):
        _check_column(name, getattr(table, name))
    _check_rows(table)
    _check_copies(table)
    _check_windows(index)
    _check_transfers(index)
    _check_storage(index)
    _check_candidates(index)


def check_idle(index: PrefixCache) -> None:
    """``check``, and that nothing holds a page but pins: no request, no transfer."""
    check(index)
    table = index.table
    full, window = index.pins.locks()
    for name, pinned in (
        ("device", full[:0]),
        ("host", full),
        ("swa_device", full[:0]),
        ("swa_host", window),
    ):
        expected = np.bincount(pinned, minlength=table.capacity)
        left = bool((getattr(table, name).locks != expected).any())
        _require(not left, f"{name}: a lock is left at idle, or that of a pin is not there")
    for kind in TransferKind:
        _require(not index.pending[kind], f"a {kind.value} is pending at idle")
    _require(index.n_storage_operations == 0, "a storage operation is pending at idle")
    _require(index.host_tier is None or index.host.detached == 0, "detached pages at idle")


def _require(condition: bool, message: str, *figures: object) -> None:
    """What differs is spelled out only then: arrays as text take longer than all comparisons."""
    if not condition:
        raise InvariantError(message.format(*figures))


def _check_column(name: str, column: SlotColumn) -> None:
    # slots below ABSENT are placeholders of an allocation that failed on this rank
    has_slots = (column.slots != ABSENT).all(axis=1)
    has_none = (column.slots == ABSENT).all(axis=1)
    _require(bool((has_slots | has_none).all()), f"{name}: a page has half of its slots")
    _require(bool((has_slots == column.present).all()), f"{name}: slots and presence differ")
    _require(not (column.ready & ~column.present).any(), f"{name}: READY without slots")
    _require(bool((column.locks >= 0).all()), f"{name}: negative lock count")
    _require(column.n_present == np.count_nonzero(column.present), f"{name}: n_present")
    locked = np.count_nonzero(column.present & (column.locks > 0))
    _require(column.n_locked == locked, f"{name}: n_locked is {column.n_locked}, not {locked}")
    used = column.slots[column.present].ravel()
    _require(len(np.unique(used)) == len(used), f"{name}: two pages share a slot")


def _check_rows(table: PageTable) -> None:
    used = np.flatnonzero(table.parent != FREE)
    _require(len(used) == table.n_rows, "row count")
    _require(table.n_indexed() == table.n_rows, "index size")
    for row in used.tolist():
        _require(table.row_of(int(table.digest[row])) == row, f"row {row} not in the index")
    inner = used[table.parent[used] >= 0]
    parents = table.parent[inner]
    _require(bool((table.parent[parents] != FREE).all()), "a row's parent is not in use")
    _require(bool((table.depth[inner] == table.depth[parents] + 1).all()), "depth")
    first = used[table.parent[used] < 0]
    _require(not table.depth[first].any(), "depth of a first page")
    counted = np.bincount(parents, minlength=table.capacity)
    _require(bool((counted[used] == table.children[used]).all()), "children count")
    _require(sum(table._root_rows.values()) == len(first), "rows of the namespaces")
    begins = table._columns.links[:, BEGIN]
    _require(bool((begins >= 0).all() and begins.sum() == len(first)), "beginnings of prompts")
    _require(bool((table.age[inner] < table.age[parents]).all()), "a page is newer than its parent")
    tails = used[table.tokens[used, -1] == PAD]
    _require(not table.children[tails].any(), "a tail has a child")
    _require(table.geometry.resumes_inside or len(tails) == 0, "a tail in a table of whole pages")


def _check_copies(table: PageTable) -> None:
    used = table.parent != FREE
    device, host = table.device, table.host
    for name in ("device", "host", "swa_device", "swa_host"):
        column: SlotColumn = getattr(table, name)
        _require(not (column.present & ~used).any(), f"{name}: copy of a row not in use")
        _require(not ((column.locks > 0) & ~used).any(), f"{name}: lock on a row not in use")
    _require(bool((device.present | host.present)[used].all()), "a row without a full copy")
    _require(not (table.swa_device.present & ~device.present).any(), "a window without its page")
    inner = np.flatnonzero(table.parent >= 0)
    parents = table.parent[inner]
    orphan = device.present[inner] & ~device.present[parents]
    _require(not orphan.any(), "device pages of a path are not a prefix of it")
    open_lock = device.locks[inner] > device.locks[parents]
    _require(not open_lock.any(), "a page is locked more often than its parent")
    _require(
        not ((table.swa_device.locks > 0) & (device.locks == 0)).any(),
        "a window is locked without its page",
    )


def _check_windows(index: PrefixCache) -> None:
    table, kept = index.table, index.kept
    ends = np.flatnonzero(kept.ends)
    uses, below = np.zeros_like(kept.uses), np.zeros_like(kept.below)
    for end in ends.tolist():
        path = table.path(end)
        below[path] += 1
        window = index.window_of(path)
        uses[window] += 1
        _require(bool(table.swa_host.ready[window].all()), "a kept window has a hole")
    _require(bool(kept.ends[list(kept.beyond)].all()), "a window is spare and not kept")
    _require(bool((uses == kept.uses).all()), "uses of window pages")
    _require(bool((below == kept.below).all()), "kept windows below a page")
    loose = table.swa_host.ready & (uses == 0) & (table.swa_host.locks == 0)
    _require(not loose.any(), "a window page on the host that no kept window needs")
    used = table.parent != FREE
    lost = used & ~table.device.present & (below == 0)
    _require(not lost.any(), "a page on the host alone leads to no resume point")


def _check_transfers(index: PrefixCache) -> None:
    table = index.table
    loading = np.zeros(table.capacity, dtype=bool)
    loading_window = loading.copy()
    saving, saving_window = loading.copy(), loading.copy()
    for transfer in index.pending[TransferKind.LOAD].values():
        loading[transfer.full.rows] = True
        loading_window[transfer.window.rows] = True
        for column, copies in ((table.host, transfer.full), (table.swa_host, transfer.window)):
            there = (column.slots[copies.rows] == copies.host).all()
            _require(bool(there), "a page left the host while it was loaded from there")
    for transfer in index.pending[TransferKind.BACKUP].values():
        if transfer.abandoned:
            continue
        saving[transfer.full.rows] = True
        saving_window[transfer.window.rows] = True
    for name, column, busy in (
        ("device", table.device, loading),
        ("swa_device", table.swa_device, loading_window),
        ("host", table.host, saving),
        ("swa_host", table.swa_host, saving_window),
    ):
        reserved = column.present & ~column.ready
        _require(bool((reserved == busy).all()), f"{name}: RESERVED without a transfer")
        _require(not (reserved & (column.locks == 0)).any(), f"{name}: RESERVED and not held")


def _check_storage(index: PrefixCache) -> None:
    table = index.table
    stored = np.flatnonzero((table.parent >= 0) & (table.stored == STORED))
    _require(
        bool((table.stored[table.parent[stored]] == STORED).all()),
        "a page counts as stored, the one in front of it does not",
    )
    busy, busy_window = (np.zeros(table.capacity, dtype=bool) for _ in range(2))
    for persist in index.persists.writing.values():
        for mask, held in ((busy, persist.full_rows), (busy_window, persist.window_rows)):
            mask[held.rows[table.generation[held.rows] == held.generations]] = True
    used = table.parent != FREE
    for states, mask in ((table.stored, busy), (table.window_stored, busy_window)):
        _require(bool(((states == STORING) == mask)[used].all()), "STORING without a persist")


def _check_candidates(index: PrefixCache) -> None:
    """What is kept up to date is what a look at every row would find, in the same order."""
    table, kept, candidates = index.table, index.kept, index.residency.candidates
    device, host = table.device, table.host
    children = _children_off_device(table)
    _require(bool((children == candidates.children_off()).all()), "children off the device")
    needed = children > 0
    duplicate = host.ready & device.ready & (host.locks == 0)
    stored, marked = table.stored == STORED, table.resume | table.resume_if_room
    youngest = (-(table.age >> TICK_SHIFT) << TICK_SHIFT) + (table.age & ((1 << TICK_SHIFT) - 1))
    rows = np.arange(table.capacity)
    for kind, members, key in (
        (Kind.VICTIMS, device.present & (device.locks == 0), table.age),
        (
            Kind.WINDOW_VICTIMS,
            table.swa_device.present & (table.swa_device.locks == 0),
            table.swa_age,
        ),
        (Kind.DUPLICATES, duplicate & ~needed & ~stored, youngest),
        (Kind.STORED_DUPLICATES, duplicate & ~needed & stored, youngest),
        (Kind.NEEDED_DUPLICATES, duplicate & needed, youngest),
        (Kind.USELESS, duplicate & (kept.below == 0), rows),
        (Kind.WINDOW_DUPLICATES, kept.ends & table.swa_device.ready, youngest),
        (Kind.SUPERSEDED, kept.ends & ~table.resume & (kept.below > 1), table.swa_age),
        (Kind.UNSAVED, marked & ~kept.ends & device.ready, rows),
    ):
        if kind is Kind.UNSAVED and index.host_tier is None:
            members = np.zeros_like(members)  # nobody saves them
        there = np.flatnonzero(members)
        there = there[np.lexsort((there, key[there]))]
        known = candidates.all(kind)
        _require(np.array_equal(there, known), "{} are {}, not {}", kind.name, known, there)
    both = np.count_nonzero(device.present & host.present)
    both += np.count_nonzero(table.swa_device.present & table.swa_host.present)
    _require(candidates.on_both_tiers() == both, "copies on both tiers")
    ends = np.flatnonzero(kept.ends & (kept.below == 1))
    tails = candidates.look_at_tails()
    places = dict(zip(ends.tolist(), tails.places_of(ends), strict=True))
    _require(tails.places == places, "tails are {}, not {}", tails.places, places)
    waiting = tails.waiting()
    in_order = sorted(waiting) == ends.tolist()
    _require(in_order, "tails in order are {}, not {}", waiting, ends)


def _children_off_device(table: PageTable) -> NDArray[np.int32]:
    """See ``Candidates.children_off``; by definition."""
    children = np.zeros(table.capacity, dtype=np.int32)
    used = np.flatnonzero(table.parent != FREE)
    for row in used[np.argsort(-table.depth[used], kind="stable")].tolist():
        if table.parent[row] >= 0 and (not table.device.present[row] or children[row] > 0):
            children[table.parent[row]] += 1
    return children
