"""What the core decides, by definition: plain Python that shares nothing with its loops."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.bins import BINS, EDGES
from sglang_ext.core.compiled.constants import FREE, PAD
from sglang_ext.core.device.eviction import COMPARED
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.retention.expiry import ENOUGH, UNKNOWN, Expiry
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.table.window import near_end
from sglang_ext.testing.model_page import ModelPage

Look = tuple[list[int], list[int], int, int]
"""(to copy now, to copy soon, room, room then), see ``demotion.Ahead``."""


def deepest_resume(usable: Sequence[bool], size: int) -> int:
    """The last boundary with a complete window of ``size`` pages before it."""
    ends = range(len(usable) + 1)
    return max(end for end in ends if all(usable[max(0, end - size) : end]))


def complete_windows(usable: Sequence[bool], size: int) -> list[bool]:
    """Whether the window of ``size`` pages that ends with each page is complete."""
    return [all(usable[max(0, end - size) : end]) for end in range(1, len(usable) + 1)]


def resume_points(
    marked: Sequence[bool], branches: Sequence[bool], complete: Sequence[bool], interval: int
) -> list[bool]:
    """Pages of a path whose windows are worth keeping, see ``windows.resume_points``.

    Args:
        branches: prefixes diverge after this page.
    """
    # boundaries, that is pages before a resume point
    available = [i + 1 for i, there in enumerate(complete) if there]
    keep = {point for point in available if branches[point - 1]}
    points = [point for point in available if marked[point - 1]]
    if not points or points[-1] < len(complete):
        points.append(len(complete))
    last = 0
    for point, following in zip(points, [*points[1:], None], strict=True):
        while interval and point - last > interval:
            near = [j for j in available if last < j <= last + interval]
            beyond = [j for j in available if j > last + interval]
            candidate = near[-1] if near else min(beyond, default=point)
            if candidate >= point:
                break
            keep.add(candidate)
            last = candidate
        needed = following is None or (interval and following - last > interval)
        if complete[point - 1] and (needed or point in keep):
            keep.add(point)
            last = point
    return [i + 1 in keep for i in range(len(complete))]


def expiry(tick: int, stays: Sequence[int], before: Sequence[int]) -> list[int]:
    """When the pages of a path expire that is used.

    Args:
        stays: ticks that each page stays.
        before: when they would have expired.
    """
    last = [tick + max(stays[i:]) for i in range(len(stays))]
    return [max(ticks) for ticks in zip(last, before, strict=True)]


def admitted(table: PageTable, expiry: Expiry) -> NDArray[np.bool_]:
    """(rows,) what learned retention lets go to the host: what is likely enough to be used before
    it expires, and what is above something that the device has not."""
    if not expiry.is_learned:
        return np.ones(table.capacity, dtype=bool)
    admitted = np.zeros(table.capacity, dtype=bool)
    rows = np.flatnonzero(table.parent != FREE)
    for row in rows.tolist():
        kind, age = int(table.kind[row]), expiry.requests_ended - int(table.used[row])
        chance = expiry.estimate.returns_while_worth(kind, age, expiry.price)
        admitted[row] = kind == UNKNOWN or chance >= ENOUGH
    for row in rows[~table.device.present[rows]].tolist():
        admitted[table.path(row)[:-1]] = True
    return admitted


def age_bin(age: int) -> int:
    """The last bin that begins no later."""
    return max(b for b in range(BINS) if EDGES[b] <= age)


def least_worth(
    table: PageTable, expiry: Expiry, rows: Sequence[int]
) -> Callable[[int], list[int]]:
    """What goes where there is no host, by how many go, as the table is now: of ``COMPARED`` times
    as many that expire next, each worth at least what is below it.

    Args:
        rows: those first that expire first.
    """
    ranks = {}
    for row in rows:
        cell = int(table.kind[row]) * BINS + age_bin(expiry.requests_ended - int(table.used[row]))
        ranks[row] = int(expiry.estimate.ranks[cell])
    paths = {row: set(table.path(row).tolist()) for row in rows}

    def of(count: int) -> list[int]:
        near = rows[: COMPARED * count]
        worth = {row: max(ranks[other] for other in near if row in paths[other]) for row in near}
        return sorted(near, key=lambda row: worth[row])[:count]

    return of


def ends_alone(
    table: PageTable, kept: KeptWindows, worth: Callable[[int], tuple[int, float]]
) -> dict[int, tuple[int, float]]:
    """Rows where prefixes can be resumed that are not on the device, with what they are worth to
    the host. A window that is no longer worth it has others below it that make up for it: its
    prefix stays as long as the last of these, and is worth what they are."""
    found: dict[int, tuple[int, float]] = {}
    for tail in np.flatnonzero(kept.ends & (kept.below == 1)).tolist():
        path = table.path(tail)
        for row in path[kept.ends[path] & ~table.device.present[path]].tolist():
            value = worth(row if row == tail or table.resume[row] else tail)
            found[row] = max(found.get(row, value), value)
    return found


def worth(table: PageTable, expiry: Expiry, row: int, forks: int) -> tuple[int, float]:
    """What the host goes by with learned retention."""
    kind, age = int(table.kind[row]), expiry.requests_ended - int(table.used[row])
    if not expiry.is_learned:
        return 0, min(1 + forks, 255) / (age + 1)
    return expiry.estimate.value(kind, age), 1 / (age + 1)


def look_ahead(evictable: Sequence[int], dirty: set[int], safe: int, low: int) -> Look:
    """What to copy ahead of eviction.

    Args:
        evictable: rows, those first that are evicted first.
        dirty: rows with which something would be lost.
        safe: pages that are free, or are being copied.
        low: pages to be free or free to evict without a loss.
    """
    enough = low - low // 3
    seen = list(evictable[: max(0, low + low // 2 - safe)])
    places = [place for place, row in enumerate(seen) if row in dirty]
    if low + low // 2 <= safe or not seen:
        return [], [], safe - enough, safe - enough
    near = [place for place in places if place < low - safe]
    soon = places[len(near) :]
    clean = places[0] if places else len(seen)
    clean_then = soon[0] if soon else len(seen)
    rows = [seen[place] for place in near], [seen[place] for place in soon]
    return *rows, safe + clean - enough, safe + clean_then - enough


def windows_to_save(
    table: PageTable, worth: set[int], has_window: Callable[[int], bool]
) -> dict[int, int]:
    """For each page of a window that is complete the end of that window. Where windows share a
    page, it is the one that ends furthest below it.

    Args:
        worth: rows with which windows end.
    """
    ends: dict[int, tuple[int, int]] = {}
    for end in worth:
        window = table.path(end)[-table.geometry.window_pages :].tolist()
        if all(has_window(row) for row in window):
            for distance, row in enumerate(reversed(window)):
                ends[row] = max(ends.get(row, (-1, -1)), (distance, end))
    return {row: end for row, (_, end) in ends.items()}


def inside(
    table: PageTable, parent: int, page: Sequence[int], *, usable: bool = True
) -> tuple[int, int]:
    """See ``PageTable.inside``: the way down a tree of the siblings that is ordered by tokens, and
    has the largest digest on top."""
    rows = [row for row in range(table.capacity) if table.parent[row] == parent]
    best, most, best_is_here, wanted = -1, 0, False, list(page)
    while rows:
        top = max(rows, key=lambda row: int(table.digest[row]))
        tokens = table.tokens[top].tolist()
        same = [a == b != PAD for a, b in zip(tokens, wanted, strict=True)]
        shared = same.index(False) if False in same else len(same)
        shared -= table.geometry.overlap
        shared -= shared % table.geometry.device_page
        here = bool(table.device.present[top] and table.swa_device.present[top])
        there = bool(table.swa_device.present[top] or table.swa_host.ready[top])
        if (there or not usable) and shared > 0 and (shared, here) > (most, best_is_here):
            best, most, best_is_here = top, shared, here
        if tokens == wanted:
            break
        goes_up = tokens < wanted
        rows = [r for r in rows if r != top and (tokens < table.tokens[r].tolist()) == goes_up]
    return best, most


def descendants(table: PageTable, row: int, levels: int) -> Iterator[int]:
    """Rows below a row, so many levels of them."""
    level = [row]
    for _ in range(levels):
        level = np.flatnonzero(np.isin(table.parent, level)).tolist()
        yield from level


def keep_windows_near_end(path: Sequence[ModelPage], geometry: Geometry, *, copy_one: bool) -> None:
    """A prompt has ended: windows near its end are worth more, and one of them is kept if prompts
    part there."""
    near, apart = near_end(geometry)
    for page in path[-near:]:
        if page.swa_device:
            page.keep_window()
    end = (len(path) - 1) // apart * apart
    window = path[max(0, end - geometry.window_pages) : end]
    if copy_one and window and all(page.has_window for page in window):
        window[-1].resume = True
