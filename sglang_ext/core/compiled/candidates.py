"""What may be evicted, dropped or copied next, and in which order; see ``core.candidates``."""

from collections import namedtuple
from typing import Any

import numba
import numpy as np
from numba import carray
from numba.core.types import Array, NamedTuple, UniTuple, boolean, int8, int32, int64, uint8, void
from numpy.typing import NDArray

from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import TICK_SHIFT
from sglang_ext.core.compiled.memory import pointer
from sglang_ext.core.compiled.ordered import N_SETS, ORDERED_FIELDS, SETS, ordered, put, take

_FLAGS = Array(boolean, 1, "C")
_INTS = Array(int32, 1, "C")
_LONGS = Array(int64, 1, "C")
_BYTES = Array(int8, 1, "C")
_BITS = Array(uint8, 1, "C")

(
    VICTIMS,
    WINDOW_VICTIMS,
    DUPLICATES,
    STORED_DUPLICATES,
    NEEDED_DUPLICATES,
    USELESS,
    WINDOW_DUPLICATES,
    SUPERSEDED,
    UNSAVED,
) = range(9)
STORED = 2
_WAITS, _IS_TAIL, _WAS_SEEN, _BOTH, _WINDOW_BOTH = 1, 2, 4, 8, 16
_WITHIN = (1 << TICK_SHIFT) - 1
ANY_AGE = -(1 << 63)

FIELDS = {
    # of the table
    "parent": _INTS,
    "age": _LONGS,
    "swa_age": _LONGS,
    "resume": _FLAGS,
    "resume_if_room": _FLAGS,
    "stored": _BYTES,
    "forks": _INTS,
    "depth": _INTS,
    "device": _FLAGS,
    "device_ready": _FLAGS,
    "device_locks": _INTS,
    "host": _FLAGS,
    "host_ready": _FLAGS,
    "host_locks": _INTS,
    "swa_device": _FLAGS,
    "swa_device_ready": _FLAGS,
    "swa_device_locks": _INTS,
    "swa_host": _FLAGS,
    "swa_host_ready": _FLAGS,
    "swa_host_locks": _INTS,
    "space": _INTS,
    # of the windows that the host keeps
    "ends": _FLAGS,
    "below": _INTS,
    "uses": _INTS,
    "pinned": _FLAGS,
    # of their own
    "bits": _BITS,  # of each row
    "off": _INTS,  # children that are not on the device, or above such
    "off_at": _INTS,  # 1 + the row that counts this one as such a child, 0: none
    "off_first": _INTS,  # 1 + the first such child
    "off_next": _INTS,  # 1 + the next child of the same row
    "off_before": _INTS,  # 1 + the one before
    "todo": _INTS,  # rows to look at
    "found": _LONGS,  # what a loop has found
    "counts": _LONGS,  # pages, and windows, on both tiers
    "tail_ages": _LONGS,  # of tails, as they were found last
    "tail_forks": _INTS,
    "held_at": _INTS,  # 1 + the namespace for which a page on the host is counted, 0: none
    "window_held_at": _INTS,  # the same for a window
    "held": _LONGS,  # pages on the host, by namespace
    "windows_held": _LONGS,
}
Fields = namedtuple("Fields", FIELDS)
FIELDS_TYPE = NamedTuple(tuple(FIELDS.values()), Fields)
STATE = int64
"""Address of what ``state_of`` gives: one number instead of many arrays."""
_SETS_AT = 1 + len(FIELDS)


def state_of(arrays: dict[str, NDArray[Any]], sets: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Rows of the table, and addresses of arrays; they have to live as long as the result, and
    must not be replaced.

    Args:
        arrays: see ``FIELDS``.
        sets: see ``ORDERED_FIELDS``.
    """
    both = (FIELDS, arrays), (ORDERED_FIELDS, sets)
    for name, type_, array in ((n, t, a[n]) for types, a in both for n, t in types.items()):
        assert numba.typeof(array) == type_, f"{name} is not {type_}"
    addresses = [values[name].ctypes.data for types, values in both for name in types]
    rows = len(arrays["parent"])
    own, others = addresses[: len(FIELDS)], addresses[len(FIELDS) :]
    return np.array([rows, *own, rows, *others], dtype=np.int64)


@compiled(FIELDS_TYPE(STATE))
def fields(state):
    """The arrays without the sets."""
    entries = carray(pointer(state), _SETS_AT, np.int64)
    rows, at = entries[0], entries[1:]
    return Fields(
        carray(pointer(at[0]), rows, np.int32),
        carray(pointer(at[1]), rows, np.int64),
        carray(pointer(at[2]), rows, np.int64),
        carray(pointer(at[3]), rows, np.bool_),
        carray(pointer(at[4]), rows, np.bool_),
        carray(pointer(at[5]), rows, np.int8),
        carray(pointer(at[6]), rows, np.int32),
        carray(pointer(at[7]), rows, np.int32),
        carray(pointer(at[8]), rows, np.bool_),
        carray(pointer(at[9]), rows, np.bool_),
        carray(pointer(at[10]), rows, np.int32),
        carray(pointer(at[11]), rows, np.bool_),
        carray(pointer(at[12]), rows, np.bool_),
        carray(pointer(at[13]), rows, np.int32),
        carray(pointer(at[14]), rows, np.bool_),
        carray(pointer(at[15]), rows, np.bool_),
        carray(pointer(at[16]), rows, np.int32),
        carray(pointer(at[17]), rows, np.bool_),
        carray(pointer(at[18]), rows, np.bool_),
        carray(pointer(at[19]), rows, np.int32),
        carray(pointer(at[20]), rows, np.int32),
        carray(pointer(at[21]), rows, np.bool_),
        carray(pointer(at[22]), rows, np.int32),
        carray(pointer(at[23]), rows, np.int32),
        carray(pointer(at[24]), rows, np.bool_),
        carray(pointer(at[25]), rows, np.uint8),
        carray(pointer(at[26]), rows, np.int32),
        carray(pointer(at[27]), rows, np.int32),
        carray(pointer(at[28]), rows, np.int32),
        carray(pointer(at[29]), rows, np.int32),
        carray(pointer(at[30]), rows, np.int32),
        carray(pointer(at[31]), rows, np.int32),
        carray(pointer(at[32]), rows, np.int64),
        carray(pointer(at[33]), 2, np.int64),
        carray(pointer(at[34]), rows, np.int64),
        carray(pointer(at[35]), rows, np.int32),
        carray(pointer(at[36]), rows, np.int32),
        carray(pointer(at[37]), rows, np.int32),
        carray(pointer(at[38]), rows, np.int64),
        carray(pointer(at[39]), rows, np.int64),
    )


@compiled(SETS(STATE), inline=True)
def sets_of(state):
    """The sets, see ``ordered``."""
    return state + 8 * _SETS_AT


@compiled(int64(int64), inline=True)
def youngest(age):
    """A key by which the most recently used page comes first; of one tick the deepest."""
    return (-(age >> TICK_SHIFT) << TICK_SHIFT) + (age & _WITHIN)


# ---- pages with something below them that is not on the device --------------------------


@compiled(int64(FIELDS_TYPE, int64, int64), inline=True)
def _wait(c, waiting, row):
    """Look at a row later; how many wait."""
    if c.bits[row] & uint8(_WAITS):
        return waiting
    c.bits[row] |= uint8(_WAITS)
    c.todo[waiting] = row
    return waiting + 1


@compiled(int64(FIELDS_TYPE, int64, int64), inline=True)
def _count_off(c, row, waiting):
    """Count a row at its parent if it is not on the device, or above such a row; how many rows
    wait: those for which that changes something do now."""
    at = int64(0)
    if c.parent[row] >= 0 and (not c.device[row] or c.off[row] > 0):
        at = int64(c.parent[row]) + 1
    counted_at = int64(c.off_at[row])
    if at == counted_at:
        return waiting
    if counted_at:
        there, following, previous = counted_at - 1, c.off_next[row], c.off_before[row]
        if previous:
            c.off_next[previous - 1] = following
        else:
            c.off_first[there] = following
        if following:
            c.off_before[following - 1] = previous
        c.off[there] -= 1
        if c.off[there] == 0:
            waiting = _wait(c, waiting, there)
    if at:
        there, following = at - 1, c.off_first[at - 1]
        c.off_next[row], c.off_before[row] = following, 0
        if following:
            c.off_before[following - 1] = row + 1
        c.off_first[there] = row + 1
        c.off[there] += 1
        if c.off[there] == 1:
            waiting = _wait(c, waiting, there)
    c.off_at[row] = at
    return waiting


@compiled(int64(STATE, _LONGS))
def off_below(state, rows):
    """Write what is below ``rows`` and not on the device to ``found``, without these rows; how many
    there are. They are counted before: none is missing."""
    c = fields(state)
    number, count, out = 0, 0, c.found
    # the children of all that is given, then of all that is found
    while number < rows.size + count:
        above = rows[number] if number < rows.size else out[number - rows.size]
        number += 1
        child = int64(c.off_first[above])
        while child:
            if not c.bits[child - 1] & uint8(_WAITS):
                c.bits[child - 1] |= uint8(_WAITS)
                out[count] = child - 1
                count += 1
            child = int64(c.off_next[child - 1])
    for i in range(rows.size):
        c.bits[rows[i]] |= uint8(_WAS_SEEN)
    kept = 0
    for i in range(count):
        row = out[i]
        c.bits[row] &= ~uint8(_WAITS)
        if not c.bits[row] & uint8(_WAS_SEEN):
            out[kept] = row
            kept += 1
    for i in range(rows.size):
        c.bits[rows[i]] &= ~uint8(_WAS_SEEN)
    return kept


# ---- settle -----------------------------------------------------------------------------


@compiled(void(FIELDS_TYPE, int64, int64, int64, boolean), inline=True)
def _count_both(c, row, number, bit, both):
    if both != ((c.bits[row] & uint8(bit)) != 0):
        c.bits[row] ^= uint8(bit)
        c.counts[number] += 1 if both else -1


@compiled(int64(FIELDS_TYPE, int64), inline=True)
def _sets_with(c, row):
    """A bit for each set that a row belongs to."""
    device, ready, swa_ready = c.device[row], c.device_ready[row], c.swa_device_ready[row]
    sets = int64(0)
    if device and c.device_locks[row] == 0:
        sets |= 1 << VICTIMS
    if c.swa_device[row] and c.swa_device_locks[row] == 0:
        sets |= 1 << WINDOW_VICTIMS
    if ready and c.host_ready[row] and c.host_locks[row] == 0:
        if c.off[row] > 0:
            sets |= 1 << NEEDED_DUPLICATES
        elif c.stored[row] == STORED:
            sets |= 1 << STORED_DUPLICATES
        else:
            sets |= 1 << DUPLICATES
        if c.below[row] == 0:
            sets |= 1 << USELESS
    if c.ends[row]:
        if swa_ready:
            sets |= 1 << WINDOW_DUPLICATES
        if not c.resume[row] and c.below[row] > 1:
            sets |= 1 << SUPERSEDED
    elif ready and (c.resume[row] or c.resume_if_room[row]):
        sets |= 1 << UNSAVED
    return sets


@compiled(int64(FIELDS_TYPE, int64, int64), inline=True)
def _key_of(c, number, row):
    """By what a set is in order."""
    if number == VICTIMS:
        return c.age[row]
    if number in (WINDOW_VICTIMS, SUPERSEDED):
        return c.swa_age[row]
    if number in (USELESS, UNSAVED):
        return row
    return youngest(c.age[row])


@compiled(boolean(FIELDS_TYPE, int64, int64), inline=True)
def _has_copy(c, number, row):
    """Whether a row has the copy that a set of victims is about."""
    return c.device[row] if number == VICTIMS else c.swa_device[row]


@compiled(boolean(FIELDS_TYPE, int64, int64), inline=True)
def _may_go(c, number, row):
    """Whether a row belongs to a set of victims."""
    if number == VICTIMS:
        return c.device[row] and c.device_locks[row] == 0
    return c.swa_device[row] and c.swa_device_locks[row] == 0


@compiled(void(FIELDS_TYPE, SETS, int64), inline=True)
def _classify(c, sets, row):
    """Have a row in those sets that it belongs to.

    A victim that is locked or used stays where it is until it is one of the first: most are
    released, and used again, long before, and paths are long.
    """
    s = ordered(sets)
    was, now = int64(s.members[row]), _sets_with(c, row)
    number, left = int64(0), was | now
    while left:
        if left & 1:
            is_in = now >> number & 1
            key = _key_of(c, number, row) if is_in else int64(0)
            if not was >> number & 1:
                put(sets, number, row, key)
            elif not is_in:
                if number > WINDOW_VICTIMS or not _has_copy(c, number, row):
                    take(sets, number, row)
            elif key < s.key[row, number] or (
                number > WINDOW_VICTIMS and s.key[row, number] != key
            ):
                take(sets, number, row)
                put(sets, number, row, key)
        number += 1
        left >>= 1
    _count_both(c, row, 0, _BOTH, c.device[row] and c.host[row])
    _count_both(c, row, 1, _WINDOW_BOTH, c.swa_device[row] and c.swa_host[row])


@compiled(int64(_LONGS, int64, int64, int64), inline=True)
def _count_held(held, at, before, space):
    """Count a copy on the host for a namespace, and no longer for the one before; 1 + which."""
    now = space + 1 if at else int64(0)
    if now != before:
        if before:
            held[before - 1] -= 1
        if now:
            held[now - 1] += 1
    return now


@compiled(void(STATE, _LONGS))
def settle_victims(state, noted):
    """Look at rows that may have changed, where there is no host: as victims alone."""
    c, sets = fields(state), sets_of(state)
    s = ordered(sets)
    count = 0
    for i in range(noted.size):
        row = noted[i]
        for number in (VICTIMS, WINDOW_VICTIMS):
            is_in = s.members[row] >> number & 1
            if is_in and not _has_copy(c, number, row):
                take(sets, number, row)
            elif _may_go(c, number, row):
                is_late = is_in and _key_of(c, number, row) < s.key[row, number]
                if is_late:
                    take(sets, number, row)
                if (is_late or not is_in) and not c.bits[row] & uint8(_WAITS):
                    c.bits[row] |= uint8(_WAITS)
                    c.found[count] = row
                    count += 1
    # paths one after the other, each from its end on: so most are put behind all others
    for number in (VICTIMS, WINDOW_VICTIMS):
        begin = 0
        while begin < count:
            end = begin + 1
            while end < count and _key_of(c, number, c.found[end]) < _key_of(
                c, number, c.found[end - 1]
            ):
                end += 1
            for i in range(end - 1, begin - 1, -1):
                row = c.found[i]
                if _may_go(c, number, row) and not s.members[row] >> number & 1:
                    put(sets, number, row, _key_of(c, number, row))
            begin = end
    for i in range(count):
        c.bits[c.found[i]] &= ~uint8(_WAITS)


@compiled(int64(STATE, _LONGS))
def settle(state, noted):
    """Look at rows that may have changed; writes tails that have to ``found``, and ``~row`` for
    those that are none any more; how many."""
    c, sets = fields(state), sets_of(state)
    waiting, tails = 0, 0
    for i in range(noted.size):
        waiting = _wait(c, waiting, noted[i])
    while waiting:
        waiting -= 1
        row = int64(c.todo[waiting])
        c.bits[row] &= ~uint8(_WAITS)
        waiting = _count_off(c, row, waiting)
        _classify(c, sets, row)
        space = int64(c.space[row])
        c.held_at[row] = _count_held(c.held, c.host[row], c.held_at[row], space)
        c.window_held_at[row] = _count_held(
            c.windows_held, c.swa_host[row], c.window_held_at[row], space
        )
        is_tail, was_tail = c.ends[row] and c.below[row] == 1, (c.bits[row] & uint8(_IS_TAIL)) != 0
        is_other = c.tail_ages[row] != c.age[row] or c.tail_forks[row] != c.forks[row]
        if is_tail != was_tail or (is_tail and is_other):
            if is_tail:
                c.bits[row] |= uint8(_IS_TAIL)
            else:
                c.bits[row] &= ~uint8(_IS_TAIL)
            c.tail_ages[row], c.tail_forks[row] = c.age[row], c.forks[row]
            if not c.bits[row] & uint8(_WAS_SEEN):
                c.bits[row] |= uint8(_WAS_SEEN)
                c.found[tails] = row
                tails += 1
    for i in range(tails):
        row = c.found[i]
        c.bits[row] &= ~uint8(_WAS_SEEN)
        if not c.bits[row] & uint8(_IS_TAIL):
            c.found[i] = ~row
    return tails


@compiled(int64(STATE, int64, int64, _LONGS))
def first(state, kinds, younger_than, out):
    """Write the first rows of some sets to ``out``, as many as it has room for; how many they are.

    Args:
        kinds: a bit for each set.
        younger_than: pages that are not are left out; ANY_AGE for all. The sets are in order
            of ``youngest`` then.
    """
    c, s = fields(state), ordered(sets_of(state))
    count, last = int64(0), youngest(younger_than) | _WITHIN
    block, place = np.zeros(N_SETS, dtype=np.int64), np.zeros(N_SETS, dtype=np.int64)
    while count < out.size:
        chosen, key, row = -1, int64(0), int64(0)
        for number in range(N_SETS):
            if kinds >> number & 1 and block[number] < s.lengths[number]:
                at = s.blocks[number, block[number]]
                there = s.begin[at] + place[number]
                other, other_row = s.keys[at, there], int64(s.rows[at, there])
                if chosen < 0 or other < key or (other == key and other_row < row):
                    chosen, key, row = number, other, other_row
        if chosen < 0 or (younger_than != ANY_AGE and key > last):
            break
        place[chosen] += 1
        at = s.blocks[chosen, block[chosen]]
        if place[chosen] == s.end[at] - s.begin[at]:
            block[chosen] += 1
            place[chosen] = 0
        if younger_than == ANY_AGE or c.age[row] > younger_than:
            out[count] = row
            count += 1
    return count


@compiled(int64(STATE, int64, _LONGS))
def first_of(state, number, out):
    """Write the first rows of a set to ``out``, as many as it has room for; how many they are."""
    c, sets = fields(state), sets_of(state)
    s = ordered(sets)
    while True:
        count, block, late = 0, 0, 0
        while count < out.size and block < s.lengths[number]:
            at = s.blocks[number, block]
            for i in range(s.begin[at], s.end[at]):
                row = int64(s.rows[at, i])
                if number <= WINDOW_VICTIMS and (
                    not _may_go(c, number, row) or s.keys[at, i] != _key_of(c, number, row)
                ):
                    c.found[late] = row
                    late += 1
                elif count < out.size:
                    out[count] = row
                    count += 1
                else:
                    break
            block += 1
        if late == 0:
            return count
        # see ``_classify``: it is time to have them where they belong
        for i in range(late):
            row = c.found[i]
            take(sets, number, row)
            if _may_go(c, number, row):
                put(sets, number, row, _key_of(c, number, row))


# ---- paths and windows ------------------------------------------------------------------


@compiled(UniTuple(int64, 2)(STATE, int64, _LONGS))
def led_nowhere(state, end, out):
    """Pages from ``end`` up that lead to no kept window: writes copies of what is on the device
    too, if nobody holds them, to the beginning of ``out``, and pages that are not, in the order of
    the path, to its end; how many each."""
    c = fields(state)
    row, copies, lost = end, int64(0), int64(0)
    while row >= 0 and c.below[row] == 0:
        if not c.device[row]:
            lost += 1
            out[out.size - lost] = row
        elif c.host_ready[row] and c.device_ready[row] and c.host_locks[row] == 0:
            out[copies] = row
            copies += 1
        row = int64(c.parent[row])
    return copies, lost


@compiled(boolean(STATE, _LONGS))
def are_on_host_alone(state, rows):
    """Whether pages have a copy on the host that nobody holds, and nothing else."""
    c = fields(state)
    for i in range(rows.size):
        row = rows[i]
        if c.device[row] or c.ends[row] or not c.host_ready[row]:
            return False
        if c.device_locks[row] > 0 or c.host_locks[row] > 0 or c.swa_host_locks[row] > 0:
            return False
    return True


@compiled(void(_INTS, _FLAGS, _LONGS, _LONGS))
def pages_since_end(parent, ends, rows, out):
    """Pages from the nearest end above each row, or from the beginning, to it."""
    for i in range(rows.size):
        row, count = int64(parent[rows[i]]), 1
        while row >= 0 and not ends[row]:
            row = int64(parent[row])
            count += 1
        out[i] = count


@compiled(int64(_INTS, _LONGS, _FLAGS, _FLAGS, _FLAGS, int64, _LONGS, _FLAGS, _LONGS))
def windows_to_save(parent, ends, ready, present, host_present, size, end_of, lost, pages):
    """See ``Demotion.windows_to_save``; writes to ``end_of``, which is -1 everywhere, and to
    ``lost``, which is False everywhere; to ``pages`` where, and how often.

    Args:
        ends: rising; those whose windows are not whole are left out.
        ready, present: windows on the device.
        host_present: windows on the host.
    """
    rows = np.empty(ends.size, dtype=np.int64)
    whole_ends = np.empty(ends.size, dtype=np.int64)
    count, written = 0, 0
    for i in range(ends.size):
        row, whole = ends[i], True
        for _ in range(size):
            whole &= ready[row] or host_present[row]
            row = int64(parent[row])
            if row < 0 or not whole:
                break
        if whole:
            rows[count] = whole_ends[count] = ends[i]
            count += 1
    # where windows share a page, it goes with the one that ends furthest below it
    for _ in range(size):
        for i in range(count):
            row = rows[i]
            if row >= 0:
                end_of[row] = whole_ends[i]
                lost[row] = present[row] and not host_present[row]
                pages[written] = row
                written += 1
                rows[i] = int64(parent[row])
    return written
