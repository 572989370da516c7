"""The children of each row as a treap, see ``PageTable.inside`` and ``below``; compiled."""

from numba.core.types import Tuple, boolean, int64, uint64, void

from sglang_ext.core.compiled.arrays import COLUMNS, LONGS, PAGES, TABLE, columns
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.compiled.digests import mix

# ---- siblings: a treap of the children of each row, see ``PageTable.inside`` ------------
# The columns of ``links`` are: the sibling below on the side of smaller and of larger tokens,
# and the topmost child. Behind the last row is the topmost first page, of all namespaces.
#
# First pages are many, and most prompts begin like none of them: on the way down each of those that
# are compared would be waited for, as none is in the CPU's caches. So the last column counts, by a
# hash of the tokens without which nobody could resume inside a page, the first pages that begin
# with them. Where there is none, nothing has to be searched. It has nothing to do with its row.

LEFT, RIGHT, TOP, BEGIN = range(4)


@compiled(int64(COLUMNS, int64, PAGES, int64), wraps=True, inline=True)
def begin_of(c, parent, pages, number):
    """Where in ``links`` first pages are counted that begin as a page does."""
    total = int64(parent)
    for k in range(c.device_page + c.overlap):
        total += pages[number, k] * c.weights[k]
    return int64(mix(uint64(total)) % uint64(c.links.shape[0]))


@compiled(Tuple((int64, int64))(COLUMNS, int64, int64, PAGES, int64), inline=True)
def compare(c, row, parent, pages, number):
    """(order of a row and a page below ``parent``: -1, 0 or 1; tokens that both names begin
    with)."""
    if c.parent[row] != parent:
        return int64(-1 if c.parent[row] < parent else 1), int64(0)
    for k in range(c.weights.size):
        a, b = c.tokens[row, k], pages[number, k]
        if a != b:
            return int64(-1 if a < b else 1), int64(k)
        if a == int64(PAD):
            return int64(0), int64(k)
    return int64(0), int64(c.weights.size)


@compiled(void(COLUMNS, int64, int64, int64))
def count_begin(c, parent, row, change):
    """A first page comes (1) or goes (-1). Not where siblings are linked: that is done for each
    page, and with this in it would be a call with all arrays."""
    c.links[begin_of(c, parent, c.tokens, row), BEGIN] += change


@compiled(int64(COLUMNS, int64), inline=True)
def top_of(c, parent):
    """Where in ``links`` the topmost child of a row is."""
    return parent if parent >= 0 else c.links.shape[0] - 1


@compiled(Tuple((int64, int64))(COLUMNS, int64, PAGES, int64, int64, boolean))
def inside_of(c, parent, pages, number, device_page, usable):
    """See ``PageTable.inside``; of one of ``pages``."""
    best, most, best_is_here = int64(-1), int64(0), False
    if parent < 0 and c.links[begin_of(c, parent, pages, number), BEGIN] == 0:
        return best, most
    row = int64(c.links[top_of(c, parent), TOP])
    while row >= 0:
        order, shared = compare(c, row, parent, pages, number)
        shared -= c.overlap
        shared -= shared % device_page
        if shared > 0 and (not usable or c.swa_device[row] or c.swa_host_ready[row]):
            here = c.device[row] and c.swa_device[row]
            if shared > most or (shared == most and here and not best_is_here):
                best, most, best_is_here = row, shared, here
        if order == 0:
            break
        row = int64(c.links[row, RIGHT if order < 0 else LEFT])
    return best, most


@compiled(Tuple((int64, int64))(TABLE, int64, PAGES, boolean))
def inside(table, parent, pages, usable):
    """See ``PageTable.inside``; of the first of ``pages``."""
    c = columns(table)
    return inside_of(c, parent, pages, 0, c.device_page, usable)


@compiled(int64(LONGS, int64, int64), inline=True)
def _note(out, count, row):
    """Write a row, if it is one, behind ``count`` others; how many they are."""
    if row < 0:
        return count
    out[count] = row
    return count + 1


@compiled(int64(TABLE, int64, LONGS))
def below(table, parent, out):
    """See ``PageTable.below``; writes to ``out``, which has room for all rows, and returns how many
    there are."""
    c = columns(table)
    waiting, number, count = int64(0), int64(0), int64(0)
    waiting = _note(out, waiting, int64(c.links[top_of(c, parent), TOP]))
    # first pages of all namespaces are in one treap: not all of what is on the way is asked for
    while number < waiting:
        row = out[number]
        number += 1
        if c.parent[row] <= parent:
            waiting = _note(out, waiting, int64(c.links[row, RIGHT]))
        if c.parent[row] >= parent:
            waiting = _note(out, waiting, int64(c.links[row, LEFT]))
    for i in range(waiting):
        if c.parent[out[i]] == parent:
            out[count] = out[i]
            count += 1
    children, number = count, int64(0)
    while number < count:
        row = out[number]
        count = _note(out, count, int64(c.links[row, TOP]))
        if number >= children:
            count = _note(out, count, int64(c.links[row, LEFT]))
            count = _note(out, count, int64(c.links[row, RIGHT]))
        number += 1
    return count


@compiled(void(COLUMNS, int64, int64))
def link_child(c, parent, row):
    """Put a new row among the children of its parent."""
    at, side = top_of(c, parent), TOP
    node = int64(c.links[at, side])
    while node >= 0 and c.digest[node] > c.digest[row]:
        order, _ = compare(c, node, parent, c.tokens, row)
        at, side = node, RIGHT if order < 0 else LEFT
        node = int64(c.links[at, side])
    c.links[at, side] = row
    # what was there goes below, on its side of the row
    low, low_side, high, high_side = row, LEFT, row, RIGHT
    while node >= 0:
        order, _ = compare(c, node, parent, c.tokens, row)
        if order < 0:
            c.links[low, low_side] = node
            low, low_side = node, RIGHT
            node = int64(c.links[node, RIGHT])
        else:
            c.links[high, high_side] = node
            high, high_side = node, LEFT
            node = int64(c.links[node, LEFT])
    c.links[low, low_side] = -1
    c.links[high, high_side] = -1


@compiled(void(COLUMNS, int64, int64))
def unlink_child(c, parent, row):
    """Take a row out of the children of its parent."""
    at, side = top_of(c, parent), TOP
    node = int64(c.links[at, side])
    while node != row:
        order, _ = compare(c, node, parent, c.tokens, row)
        at, side = node, RIGHT if order < 0 else LEFT
        node = int64(c.links[at, side])
    low, high = int64(c.links[row, LEFT]), int64(c.links[row, RIGHT])
    while low >= 0 and high >= 0:
        if c.digest[low] > c.digest[high]:
            c.links[at, side] = low
            at, side = low, RIGHT
            low = int64(c.links[low, RIGHT])
        else:
            c.links[at, side] = high
            at, side = high, LEFT
            high = int64(c.links[high, LEFT])
    c.links[at, side] = low if low >= 0 else high
