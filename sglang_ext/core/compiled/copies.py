"""Which pages of a path are copied to the host, what of the host is needed no longer, and what an
eviction from the device loses; see ``moves.backups`` and ``device.eviction``.

Each is one call over the arrays of ``candidates``: of what it reads nothing is gathered first.
"""

import numpy as np
from numba.core.types import Array, UniTuple, boolean, int64

from sglang_ext.core.compiled.arrays import SLOTS
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.candidates import STATE, fields, led_nowhere
from sglang_ext.core.compiled.constants import ABSENT, FREE, INSIDE_BAND
from sglang_ext.core.compiled.kept import remove
from sglang_ext.core.compiled.windows import complete_windows, deepest_resume

_LONGS = Array(int64, 1, "C")
NOTHING_MISSING = -1


@compiled(UniTuple(int64, 3)(STATE, _LONGS, _LONGS, boolean, int64, int64, boolean, _LONGS, _LONGS))
def plan(state, path, pages, on_device, window, most_if_room, ends_with_tail, full, stops):
    """What a backup of a path copies.

    Args:
        pages: those to copy, in the order of the path.
        on_device: of them only those that are READY there.
        window: pages of one.
        most_if_room: so many windows may be copied that are worth it as long as there is room.
        ends_with_tail: the page before the last one is where storage goes on.
        full: gets the pages, of those that have no copy, that lead to a window on the host.
        stops: gets the pages before each resume point whose window is to be kept and is not yet,
            the deepest first.

    Returns:
        How many pages, how many resume points, and how many pages of the first window are missing
        on the host; NOTHING_MISSING if of no window any is.
    """
    c = fields(state)
    n = path.size
    usable = np.empty(n, dtype=np.bool_)
    complete = np.empty(n, dtype=np.bool_)
    reach = int64(0)
    for i in range(n):
        row = path[i]
        usable[i] = c.swa_host[row] or c.swa_device_ready[row]
        reach += c.below[row] > 0
    complete_windows(usable, window, complete)
    best = deepest_resume(usable, window)
    count, if_room = int64(0), most_if_room
    for i in range(n - 1, -1, -1):
        row = path[i]
        if c.ends[row]:
            continue
        worth = c.resume[row] and complete[i]
        if if_room > 0 and c.resume_if_room[row] and complete[i]:
            if_room -= 1
            worth = True
        # without which the path could not be resumed at its end
        worth |= i + 1 == best and best > reach
        if ends_with_tail and i == n - 2:
            worth = complete[i]
        if worth:
            stops[count] = i + 1
            count += 1
    led = max(reach, stops[0]) if count else reach
    copied = int64(0)
    for i in range(pages.size):
        row = pages[i]
        if c.host[row] or c.depth[row] >= led or (on_device and not c.device_ready[row]):
            continue
        full[copied] = row
        copied += 1
    any_missing, deepest = False, int64(0)
    for number in range(count):
        for i in range(max(0, stops[number] - window), stops[number]):
            if not c.swa_host[path[i]]:
                any_missing = True
                deepest += number == 0
        if any_missing:
            break
    return copied, count, deepest if any_missing else int64(NOTHING_MISSING)


@compiled(int64(STATE, _LONGS, _LONGS, int64, _LONGS))
def leading_somewhere(state, path, pages, stop, out):
    """Write those of ``pages`` on a path to ``out`` that lead to a window on the host, of which one
    is kept before ``stop``; how many."""
    c = fields(state)
    led, count = stop, int64(0)
    for i in range(path.size - 1, stop - 1, -1):
        if c.below[path[i]] > 0:
            led = i + 1
            break
    for i in range(pages.size):
        if c.depth[pages[i]] < led:
            out[count] = pages[i]
            count += 1
    return count


@compiled(int64(STATE, _LONGS, _LONGS))
def unneeded(state, rows, out):
    """Write window pages on the host to ``out`` that no kept window needs and no transfer uses; how
    many."""
    c, count = fields(state), int64(0)
    for i in range(rows.size):
        row = rows[i]
        if c.swa_host_ready[row] and c.uses[row] == 0 and c.swa_host_locks[row] == 0:
            out[count] = row
            count += 1
    return count


@compiled(UniTuple(int64, 5)(STATE, int64, int64, _LONGS, _LONGS, _LONGS))
def forget_tail(state, end, window, changed, windows, pages):
    """Keep the last kept window of a prefix no longer, see ``Residency.forget_tail``.

    Args:
        changed: as for ``kept.remove``.
        windows: gets window pages on the host that are needed no longer.
        pages: gets copies and lost pages, as for ``led_nowhere``.

    Returns:
        How many are changed, windows, copies, and lost pages; and the end of the last kept window
        of the prefix then, or -1 if it has none or others go on from there.
    """
    c = fields(state)
    n_changed, free = remove(c.parent, c.ends, c.uses, c.below, end, window, changed, windows)
    n_windows = unneeded(state, windows[:free], windows)
    copies, lost = led_nowhere(state, end, pages)
    above = int64(-1)
    for i in range(n_changed):
        if c.ends[changed[i]] and c.below[changed[i]] == 1:
            above = changed[i]
    return n_changed, n_windows, copies, lost, above


@compiled(int64(STATE, _LONGS, int64, boolean, _LONGS))
def lost(state, rows, first, windows_alone, out):
    """Write places of ``rows`` from ``first`` on to ``out`` with which something is lost that is
    nowhere else; how many."""
    c, count = fields(state), int64(0)
    for i in range(first, rows.size):
        row = rows[i]
        kept = c.swa_host_ready[row] and c.uses[row] > 0
        # below that band are windows that no request resumes from
        is_lost = c.swa_device[row] and not kept and c.swa_age[row] >= INSIDE_BAND
        if not windows_alone:
            is_lost |= not (c.host_ready[row] and c.below[row] > 0)
        if is_lost:
            out[count] = i
            count += 1
    return count


@compiled(UniTuple(int64, 2)(STATE, _LONGS, _LONGS, _LONGS))
def evicted(state, rows, windows, alone):
    """Write those of pages on the device that have their windows there to ``windows``, and those
    without a copy on the host to ``alone``; how many each."""
    c = fields(state)
    n_windows, n_alone = int64(0), int64(0)
    for i in range(rows.size):
        row = rows[i]
        if c.swa_device[row]:
            windows[n_windows] = row
            n_windows += 1
        if not c.host[row]:
            alone[n_alone] = row
            n_alone += 1
    return n_windows, n_alone


@compiled(UniTuple(int64, 2)(STATE, _LONGS, SLOTS))
def already_there(state, rows, windows):
    """Pages that a request has computed and that have a row already.

    Args:
        windows: slots of the request's windows.

    Returns:
        How many of them are on the device, with a window there unless the request has none; and
        how many windows the request has.
    """
    c = fields(state)
    there, live = int64(0), int64(0)
    for i in range(rows.size):
        row, has_window = rows[i], windows[i, 0] != ABSENT
        live += has_window
        there += c.device[row] and (c.swa_device[row] or not has_window)
    return there, live


@compiled(UniTuple(int64, 2)(STATE, _LONGS, _LONGS))
def led_nowhere_of(state, rows, out):
    """Write those of pages that are in the table still to ``out`` that lead to no window on the
    host; how many, and how many of the others there are."""
    c = fields(state)
    count, others = int64(0), int64(0)
    for i in range(rows.size):
        row = rows[i]
        if c.parent[row] == FREE:
            continue
        if c.below[row] > 0:
            others += 1
        else:
            out[count] = row
            count += 1
    return count, others


@compiled(boolean(STATE, int64, int64))
def tail_is_held(state, end, window):
    """Whether a transfer or a pin has the last kept window of a prefix, or what would be lost with
    it. Pinned pages that other kept windows need stay with those."""
    c = fields(state)
    row, place = end, int64(0)
    # the further up a page is, the more windows it leads to
    while row >= 0 and (place < window or c.below[row] == 1):
        if place < window and c.swa_host_locks[row] > 0 and not (c.pinned[row] and c.uses[row] > 1):
            return True
        if c.below[row] == 1 and not c.device[row] and c.host_locks[row] > 0:
            return True
        place += 1
        row = int64(c.parent[row])
    return False


@compiled(boolean(STATE, int64, int64))
def tail_stays(state, end, window):
    """Whether the last kept window of a prefix cannot go now: it is held, see ``tail_is_held``, or
    it is on the device too."""
    c = fields(state)
    row, place, whole = end, int64(0), True
    while whole and row >= 0 and place < window:
        whole = c.swa_device_ready[row]
        place += 1
        row = int64(c.parent[row])
    return whole or tail_is_held(state, end, window)
