"""Loops over the rows of a path, for ``PageTable``.

Rows are int64; arrays are named as the attributes of ``PageTable`` are. A type is written out where
NumPy's numbers would be narrower than Numba's: both run these loops, see ``loop_sets``.
"""

import numpy as np
from numba.core.types import (
    Tuple,
    boolean,
    int64,
    uint64,
    void,
)

from sglang_ext.core.compiled.arrays import (
    COLUMNS,
    DIGESTS,
    FOUND,
    LONGS,
    PAGES,
    TABLE,
    columns,
)
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import (
    DIGEST_BASE,
    FREE,
    INSIDE_BAND,
    LEARNED,
    LEFT_THE_PATH,
    LFU,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_RANK,
    NO_REQUEST,
    PAD,
    PRIORITY,
    RANK_SHIFT,
    SESSIONS,
    SLRU,
    TICK_SHIFT,
    TLRU,
    UNUSED_BAND,
)
from sglang_ext.core.compiled.digests import find, forget, half, page_digest, power, remember
from sglang_ext.core.compiled.memory import prefetch
from sglang_ext.core.compiled.siblings import (
    LEFT,
    RIGHT,
    TOP,
    count_begin,
    inside_of,
    link_child,
    unlink_child,
)
from sglang_ext.core.compiled.windows import complete_windows, deepest_resume, resume_points

_UNUSED_TO_INSIDE = INSIDE_BAND - UNUSED_BAND


# ---- lookup -----------------------------------------------------------------------


@compiled(int64(COLUMNS, int64, PAGES, int64))
def difference(c, row, pages, number):
    """0 if a row has the name of a page."""
    differs = int64(0)
    for k in range(c.weights.size):
        differs |= c.tokens[row, k] ^ pages[number, k]
    return differs


@compiled(int64(COLUMNS, PAGES, int64, uint64, LONGS), wraps=True, inline=True)
def _lookup(c, pages, root, seed, out):
    depth, parent, digest = 0, root, uint64(seed)
    while depth < pages.shape[0]:
        digest += page_digest(pages, depth, c.weights) * power(uint64(depth))
        row = find(c.buckets, c.digest, digest)
        if row < 0 or c.parent[row] != parent:
            break
        start = depth
        while True:
            if difference(c, row, pages, depth) != 0:
                break
            out[depth] = row
            parent = row
            depth += 1
            row += 1
            if depth == pages.shape[0] or row == c.parent.size or c.parent[row] != parent:
                break
        if depth == start:
            break  # another prefix with the same digest
        digest = c.digest[parent]
    return depth


@compiled(int64(TABLE, PAGES, int64, uint64, LONGS))
def lookup(table, pages, root, seed, out):
    """See ``PageTable.lookup``; writes the rows to ``out`` and returns how many they are."""
    return _lookup(columns(table), pages, root, seed, out)


@compiled(int64(TABLE, PAGES, int64, uint64, int64), wraps=True)
def child(table, page, parent, digest, depth):
    """Row below ``parent``, which has a digest, with the first of ``page``; -1 if there is none."""
    c = columns(table)
    wanted = uint64(digest) + page_digest(page, 0, c.weights) * power(uint64(depth))
    row = find(c.buckets, c.digest, wanted)
    if row < 0 or c.parent[row] != parent or difference(c, row, page, 0) != 0:
        return int64(-1)
    return row


@compiled(void(TABLE, int64, LONGS))
def path(table, row, out):
    """See ``PageTable.path``; writes to all of ``out``, from its end."""
    c = columns(table)
    for i in range(out.size - 1, -1, -1):
        out[i] = row
        row = int64(c.parent[row])


@compiled(FOUND(COLUMNS, PAGES, int64, uint64, int64, LONGS), inline=True)
def _match(c, pages, root, seed, window, out):
    known = _lookup(c, pages, root, seed, out)
    count, cut, total, width = known, int64(0), pages.shape[0], c.weights.size
    if out.size > total:
        parent = out[known - 1] if known > 0 else root
        if known < total:
            last, shared = inside_of(c, parent, pages, known, c.device_page, True)
        elif out.size > total + 1:
            rest = np.full((1, width), PAD, dtype=np.int64)
            rest[0, : out.size - total - 1] = out[total + 1 :]
            last, shared = inside_of(c, parent, rest, 0, c.device_page, True)
        else:
            last, shared = int64(-1), int64(0)
        if last >= 0:
            out[known] = last
            count, cut = known + 1, width - c.overlap - shared
    usable = np.empty(count, dtype=np.bool_)
    on_device = count
    for i in range(count - 1, -1, -1):
        row = out[i]
        usable[i] = c.swa_device[row] or c.swa_host_ready[row]
        if not c.device[row]:
            on_device = i
    best = deepest_resume(usable, window)
    for i in range(on_device):
        usable[i] = c.swa_device[out[i]]
    ready = deepest_resume(usable[:on_device], window)
    to_pin = 0
    if ready < best:
        for i in range(max(0, best - window), best):
            row = out[i]
            to_pin += not (c.swa_device[row] and c.swa_locks[row] > 0)
    else:
        best = ready
    if best > known:
        return int64(0), best, ready, to_pin, cut
    return known - best, best, ready, to_pin, int64(0)


@compiled(FOUND(TABLE, PAGES, int64, uint64, int64, LONGS))
def match(table, pages, root, seed, window, out):
    """See ``PageTable.match``; writes the rows to ``out``: (pages found behind the best resume
    point, its pages, those of the best one on the device, window pages to pin, tokens cut off).

    Args:
        out: room for a row for each page; where the match may end inside one, for one more, and
            behind them the rest of the prompt.
    """
    return _match(columns(table), pages, root, seed, window, out)


@compiled(int64(COLUMNS, int64, int64), inline=True)
def age_of(c, row, tick):
    """Recency and depth of a page, see ``TICK_SHIFT``."""
    return (int64(tick) << TICK_SHIFT) + (MAX_DEPTH - int64(c.depth[row]))


@compiled(int64(COLUMNS, int64, int64), inline=True)
def rank_of(c, row, policy):
    """What an eviction policy gives a page: from 0 to ``MAX_RANK``, never more than the one before
    it on its path."""
    if policy == LFU:
        return int64(min(c.hits[row], MAX_RANK))
    if policy == SLRU:
        return int64(c.hits[row] >= 2)
    if policy == PRIORITY:
        return int64(c.priority[row])
    if policy == SESSIONS:
        return int64(c.priority[row] > 0)
    if policy == TLRU:
        return int64(c.depth[row] < c.priority[row])
    return int64(0)


@compiled(void(COLUMNS, LONGS, int64))
def _expire_later(c, rows, tick):
    """Pages of a path expire when their classes do: no sooner than before, and none before a page
    below it."""
    expires = int64(tick)
    for i in range(rows.size - 1, -1, -1):
        row = rows[i]
        expires = max(expires, tick + c.stay[c.kind[row]])
        c.age[row] = max(c.age[row], age_of(c, row, expires))


@compiled(int64(COLUMNS, int64, int64, int64), inline=True)
def _window_age(c, row, tick, policy):
    """Age of a window page that is used: where pages expire, it does with its page."""
    return c.age[row] if policy == LEARNED else age_of(c, row, tick)


@compiled(void(COLUMNS, LONGS, int64, int64, int64), inline=True)
def _use(c, rows, tick, policy, window):
    n = rows.size
    if policy == LEARNED:
        _expire_later(c, rows, tick)
    else:
        for i in range(n):
            row = rows[i]
            c.age[row] = (rank_of(c, row, policy) << RANK_SHIFT) + age_of(c, row, tick)
    for i in range(max(0, n - window), n):
        c.swa_age[rows[i]] = _window_age(c, rows[i], tick, policy)
    c.resume[rows[n - 1]] = True
    # who shares a prefix comes back to where it branches off when its own pages are gone
    for i in range(n):
        if c.children[rows[i]] > 1:
            for j in range(max(0, i + 1 - window), i + 1):
                c.swa_age[rows[j]] = _window_age(c, rows[j], tick, policy)


@compiled(void(TABLE, LONGS, int64, int64, int64))
def use(table, rows, tick, policy, window):
    """See ``PageTable.use``."""
    _use(columns(table), rows, tick, policy, window)


@compiled(void(TABLE, LONGS, int64))
def use_window(table, rows, tick):
    """See ``PageTable.use_window``."""
    c = columns(table)
    for i in range(rows.size):
        c.swa_age[rows[i]] = max(c.swa_age[rows[i]], age_of(c, rows[i], tick))


@compiled(FOUND(TABLE, PAGES, int64, uint64, int64, int64, int64, LONGS))
def match_and_use(table, pages, root, seed, tick, policy, window, out):
    """``match``, then ``use`` of what it finds."""
    c = columns(table)
    found = _match(c, pages, root, seed, window, out)
    if found[1] > 0:
        _use(c, out[: found[1]], tick, policy, window)
    return found


@compiled(boolean(COLUMNS, LONGS, int64, int64))
def _count_request(c, rows, request, priority):
    new = False
    for i in range(rows.size):
        row = rows[i]
        if c.priority[row] < priority:
            c.priority[row] = priority
        if c.last_request[row] != request:
            c.last_request[row] = request
            c.hits[row] += c.hits[row] < MAX_COUNT
            new = True
    return new


@compiled(boolean(TABLE, LONGS, int64, int64))
def count_request(table, rows, request, priority):
    """See ``PageTable.count_request``."""
    return _count_request(columns(table), rows, request, priority)


@compiled(void(COLUMNS, LONGS, int64, int64))
def mark_resume_points(c, rows, window, interval):
    """Decide which windows of a path that has grown are worth keeping."""
    n = rows.size
    usable = np.empty(n, dtype=np.bool_)
    marked = np.empty(n, dtype=np.bool_)
    complete = np.empty(n, dtype=np.bool_)
    keep = np.empty(n, dtype=np.bool_)
    for i in range(n):
        usable[i] = c.swa_device[rows[i]] or c.swa_host_ready[rows[i]]
        marked[i] = c.resume[rows[i]]
    complete_windows(usable, window, complete)
    for i in range(n):
        row = rows[i]
        # one request fewer went on: it ended there; two fewer: one of them went elsewhere
        branches = c.children[row] > 1
        if i + 1 < n and c.hits[row] - c.hits[rows[i + 1]] >= LEFT_THE_PATH:
            branches = True
        keep[i] = branches and complete[i]
    resume_points(marked, complete, interval, keep)
    for i in range(n):
        if keep[i] and not marked[i]:
            for j in range(max(0, i + 1 - window), i + 1):
                if c.swa_age[rows[j]] < INSIDE_BAND:
                    c.swa_age[rows[j]] += _UNUSED_TO_INSIDE
    for i in range(n):
        c.resume[rows[i]] = keep[i]


@compiled(void(TABLE, LONGS, int64, int64, int64, int64, int64, int64))
def record(table, rows, request, priority, tick, policy, window, interval):
    """See ``PageTable.record``."""
    c = columns(table)
    _count_request(c, rows, request, priority)
    _use(c, rows, tick, policy, window)
    mark_resume_points(c, rows, window, interval)


# ---- rows ---------------------------------------------------------------------------


@compiled(void(COLUMNS, PAGES, uint64, int64, DIGESTS), wraps=True)
def digest_ahead(c, pages, digest, depth, out):
    """Digests of pages below ``digest``. What a search for each of them reads is on its way to
    the cache afterwards: one after the other, they would wait for memory where a table is large."""
    digest, factor = uint64(digest), power(uint64(depth))
    for i in range(out.size):
        digest += page_digest(pages, i, c.weights) * factor
        factor *= uint64(DIGEST_BASE)
        out[i] = digest
        home = int64(half(digest) & uint64(c.buckets.size - 1))
        prefetch(c.buckets.ctypes.data + home * c.buckets.itemsize)


@compiled(
    Tuple((int64, int64))(TABLE, PAGES, int64, uint64, int64, int64, int64, int64, int64, LONGS)
)
def append(table, pages, parent, digest, depth, tick, requests, space, cursor, out):
    """See ``PageTable.add_rows``; writes the rows to ``out`` and returns how many they are and
    where the next search for a free one begins."""
    c = columns(table)
    count, scanned = 0, 0
    capacity = c.parent.size
    digests = np.empty(pages.shape[0], dtype=np.uint64)
    digest_ahead(c, pages, digest, depth, digests)
    for i in range(pages.shape[0]):
        if find(c.buckets, c.digest, digests[i]) >= 0:
            break
        row = cursor
        while scanned < capacity and c.parent[row] != FREE:
            scanned += 1
            row += 1
            if row == capacity:
                row = 0
        if scanned == capacity:
            break
        scanned += 1
        cursor = row + 1 if row + 1 < capacity else 0
        c.parent[row] = parent if i == 0 else out[i - 1]
        c.digest[row] = digests[i]
        remember(c.buckets, digests[i], row)
        out[i] = row
        count += 1
    if count == 0:
        return count, cursor
    # in a loop of their own, since they are much longer than what the others write
    for i in range(count):
        for k in range(c.weights.size):
            c.tokens[out[i], k] = pages[i, k]
    for i in range(count):
        row = out[i]
        c.depth[row] = depth + i
        c.children[row] = i + 1 < count
        c.space[row] = space
        c.swa_age[row] = UNUSED_BAND + age_of(c, row, tick)
        c.hits[row] = 0
        c.forks[row] = 0
        c.priority[row] = 0
        c.resume[row] = False
        c.stored[row] = 0
        c.window_stored[row] = 0
        c.keyed[row] = False
        c.last_request[row] = NO_REQUEST
        c.age[row] = 0
        c.kind[row] = 0
        c.used[row] = requests
    for i in range(count):
        c.links[out[i], TOP] = out[i + 1] if i + 1 < count else -1
        if i > 0:
            c.links[out[i], LEFT] = c.links[out[i], RIGHT] = -1
    link_child(c, parent, out[0])
    if parent >= 0:
        shared = c.hits[parent] > 1 or c.children[parent] > 0
        c.forks[parent] += shared and c.forks[parent] < MAX_COUNT
        c.children[parent] += 1
    else:
        count_begin(c, parent, out[0], 1)
    return count, cursor


@compiled(int64(TABLE, LONGS, LONGS))
def remove(table, rows, roots):
    """See ``PageTable.remove_rows``; writes the namespaces of first pages to ``roots`` and returns
    how many they are, -1 if one of the rows still has a child."""
    c = columns(table)
    first = int64(0)
    for i in range(rows.size):
        row = rows[i]
        forget(c.buckets, c.digest[row], row)
        parent = c.parent[row]
        unlink_child(c, parent, row)
        if parent >= 0:
            c.children[parent] -= 1
        else:
            count_begin(c, parent, row, -1)
            roots[first] = parent
            first += 1
    childless = True
    for i in range(rows.size):
        row = rows[i]
        childless &= c.children[row] == 0
        c.parent[row] = FREE
        c.generation[row] += 1
        c.resume_if_room[row] = False
    return first if childless else int64(-1)
