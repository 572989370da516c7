"""One host memory for both components: extents that each takes and gives back.

The memory is cut into extents of equal size. An extent belongs to nobody or to one
component, whose pages fill it; a page lies in one extent. Full-attention pages and
sliding-window pages are of different size, so each component numbers its pages as if
the whole memory were its own: page ``n`` is the bytes ``[n * page_bytes, (n + 1) *
page_bytes)``. That is what lets two ordinary pools be views of one memory. Pools keep K
and V apart, in two *planes* of the memory; the same holds in each. A component may have more
pools, of layers of another shape, in planes that other components leave empty.

Nothing here depends on anything but the calls made, so every rank gets the same pages.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import arena as loops
from sglang_ext.core.table.columns import Slots

Pages = NDArray[np.int64]
"""Page numbers of one component."""
NOBODY = -1
_PAGES = 16
"""Pages of the larger component in an extent, if the memory is neither small nor large."""
_ALIGNMENT = 256
"""Bytes; as far as pages are multiples of it."""
_FEWEST, _MOST = 32, 1024
"""Extents of a small and of a large memory."""
_LEFT_OUT = 1 << 62


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaShape:
    """How a memory is cut.

    Attributes:
        extents: how many there are.
        extent_bytes: size of an extent in each plane.
        page_bytes: for each component, size of a page in each plane; 0 where it has nothing. All
            have something in the first one.
        slots_per_page: slots of one page, numbered in the order of their bytes.
    """

    extents: int
    extent_bytes: tuple[int, ...]
    page_bytes: tuple[tuple[int, ...], ...]
    slots_per_page: int

    def __post_init__(self) -> None:
        for size in self.page_bytes:
            if any(2 * page > extent for page, extent in zip(size, self.extent_bytes, strict=True)):
                raise ValueError(f"extents of {self.extent_bytes} bytes are too small for {size}")
            for page, extent in zip(size, self.extent_bytes, strict=True):
                if page and page * self.extent_bytes[0] != extent * size[0]:
                    raise ValueError(f"pages of {self.page_bytes} bytes divide K and V differently")

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Size of each plane."""
        return tuple(self.extents * size for size in self.extent_bytes)

    def page_numbers(self, component: int) -> tuple[Pages, Pages]:
        """Pages ``[first, stop)`` of a component that lie in each extent as a whole."""
        # the same in every plane that it uses: all are divided in the same proportion
        page, extent = self.page_bytes[component][0], self.extent_bytes[0]
        start = np.arange(self.extents, dtype=np.int64) * extent
        return -(-start // page), (start + extent) // page

    def pages(self, component: int) -> int:
        """Numbers of pages in use: all are smaller."""
        return int(self.page_numbers(component)[1].max(initial=0))


def shape_for(
    budget: int, page_bytes: tuple[tuple[int, ...], ...], slots_per_page: int
) -> ArenaShape:
    """Extents for a memory of at most ``budget`` bytes.

    Enough of them that little is lost in the last one of each component; not so many that
    looking through them takes time; each large enough that pages which would lie in two
    extents, and are not used, are few.

    Raises:
        ValueError: the components divide a page between the planes in different proportions.
    """
    planes = list(zip(*page_bytes, strict=True))
    shares = [_share_of_first(sizes, planes[0]) for sizes in planes]
    most = int(budget // (max(planes[0]) * sum(shares)))
    pages = max(2, min(_PAGES, most // _FEWEST), most // _MOST)
    size = pages * max(planes[0])
    # an extent begins where a tensor may in every plane, and with a page of each if it can
    unit = math.gcd(_ALIGNMENT, *(size for sizes in page_bytes for size in sizes))
    step = unit * math.lcm(*(share.denominator for share in shares))
    even = math.lcm(step, *planes[0])
    step = even if even <= size else step
    size = max(1, size // step) * step
    extent_bytes = tuple(int(size * share) for share in shares)
    extents = budget // sum(extent_bytes)
    return ArenaShape(extents, extent_bytes, page_bytes, slots_per_page)


def _share_of_first(sizes: Sequence[int], first: Sequence[int]) -> Fraction:
    """What an extent has in a plane for each byte in the first one.

    Args:
        sizes, first: of a page of each component in the plane, and in the first one.
    """
    shares = {Fraction(size, of) for size, of in zip(sizes, first, strict=True) if size}
    if len(shares) != 1:
        raise ValueError(f"pages of {first} and {sizes} bytes divide K and V differently")
    return shares.pop()


class Arena:
    """Who has which extent, and which of its pages are taken.

    Attributes:
        owner: (extents,) int8, component or NOBODY.
        changes: how often pages were taken or given back.
    """

    def __init__(self, shape: ArenaShape) -> None:
        self.shape = shape
        numbers = [shape.page_numbers(component) for component in range(len(shape.page_bytes))]
        self._first = [first for first, _ in numbers]
        self._stop = [stop for _, stop in numbers]
        self._size = [stop - first for first, stop in numbers]
        self._least = [int(size.min()) if len(size) else 0 for size in self._size]
        self.owner = np.full(shape.extents, NOBODY, dtype=np.int8)
        self._used = np.zeros(shape.extents, dtype=np.int64)
        self.changes = 0
        self.clear()

    def clear(self) -> None:
        """Take everything back."""
        self.changes += 1
        self.owner[:] = NOBODY
        self._used[:] = 0
        self._taken = [np.zeros(stop.max(initial=0), dtype=bool) for stop in self._stop]
        self._holes = [0] * len(self._stop)
        self._in_free_extents = [int(size.sum()) for size in self._size]

    # ---- room ----------------------------------------------------------------

    def holes(self, component: int) -> int:
        """Free pages in the extents of a component."""
        return self._holes[component]

    def pages_per_extent(self, component: int) -> int:
        """Pages that every extent can hold; some hold one more."""
        return self._least[component]

    def taken(self, component: int) -> int:
        """Pages that a component has."""
        return int(self._used[self.owner == component].sum())

    def usage(self) -> dict[str, int]:
        """Bytes of the memory: ``full`` and ``window`` hold pages, ``holes`` lie in extents
        of a component that has other pages there, ``free`` in extents of nobody. With one
        component, windows are all there is."""
        size = sum(self.shape.extent_bytes)
        components = ("full", "window")[-len(self.shape.page_bytes) :]
        pages = {
            name: self.taken(component) * sum(self.shape.page_bytes[component])
            for component, name in enumerate(components)
        }
        owned = size * int(np.count_nonzero(self.owner != NOBODY))
        free = size * self.free_extents
        return {**pages, "holes": owned - sum(pages.values()), "free": free}

    @property
    def free_extents(self) -> int:
        """Extents that belong to nobody."""
        return int(np.count_nonzero(self.owner == NOBODY))

    def free_pages(self, component: int) -> int:
        """Pages that ``allocate`` could hand out now."""
        return self._holes[component] + self._in_free_extents[component]

    # ---- pages ---------------------------------------------------------------

    def allocate(self, component: int, pages: int) -> Pages | None:
        """Free pages, all or nothing. The fullest extents are filled first, so that others
        run empty."""
        if pages > self.free_pages(component):
            return None
        self.changes += 1
        first, stop = self._first[component], self._stop[component]
        taken, count = self._taken[component], 0
        found: Pages = np.empty(pages, dtype=np.int64)
        if pages and self._holes[component]:
            count = loops.take_holes(self.owner, self._used, first, stop, taken, component, found)
        while count < pages:
            extent = int(np.argmax(self.owner == NOBODY))
            self._give(extent, component)
            self._holes[component] += int(self._size[component][extent])
            before = count
            count = loops.take(taken, int(first[extent]), int(stop[extent]), found, count)
            self._used[extent] += count - before
        self._holes[component] -= pages
        return found

    def release(self, component: int, pages: Pages) -> None:
        """Give pages back; an extent without pages belongs to nobody."""
        self.changes += 1
        first, taken = self._first[component], self._taken[component]
        empty = np.empty(len(pages), dtype=np.int64)
        count = loops.release(first, self._used, taken, np.ascontiguousarray(pages), empty)
        assert count >= 0, "a free host page was freed again"
        self._holes[component] += len(pages)
        for extent in empty[:count].tolist():
            self._give(extent, NOBODY)
            self._holes[component] -= int(self._size[component][extent])

    def _give(self, extent: int, owner: int) -> None:
        """Make an extent somebody's, or nobody's."""
        self.owner[extent] = owner
        sign = 1 if owner == NOBODY else -1
        for component, sizes in enumerate(self._size):
            self._in_free_extents[component] += sign * int(sizes[extent])

    def extent_of(self, component: int, pages: Pages) -> Pages:
        """The extent in which each page lies."""
        extents: Pages = np.searchsorted(self._first[component], pages, side="right") - 1
        return extents

    # ---- compaction ----------------------------------------------------------

    def to_vacate(self, component: int, are_movable: Callable[[Pages], bool]) -> Pages:
        """Pages to move elsewhere to set an extent of a component free, the emptiest one; none if
        that is not possible.

        Args:
            are_movable: tells of the pages of an extent whether all of them may be moved.
        """
        first, stop = self._first[component], self._stop[component]
        # its pages fit into the holes of the others
        fit = self._holes[component] >= self._size[component]
        extents = np.flatnonzero((self.owner == component) & fit)
        used = self._used[extents]
        for _ in range(len(extents)):
            emptiest = int(used.argmin())
            extent, used[emptiest] = extents[emptiest], _LEFT_OUT
            begin, end = int(first[extent]), int(stop[extent])
            pages: Pages = np.flatnonzero(self._taken[component][begin:end]) + begin
            if are_movable(pages):
                return pages
        return np.empty(0, dtype=np.int64)

    def move(self, component: int, pages: Pages) -> Pages:
        """New places for the pages of one extent, which becomes free; the contents have to
        be copied before anything else is written there."""
        extent = int(self.extent_of(component, pages[:1])[0])
        assert len(pages) == self._used[extent], "an extent is vacated as a whole"
        taken = self._taken[component]
        first, stop = self._first[component][extent], self._stop[component][extent]
        # taken as a whole for the moment: a page must not move within its extent
        taken[first:stop] = True
        blocked = int(self._size[component][extent]) - len(pages)
        self._used[extent] += blocked
        self._holes[component] -= blocked
        places = self.allocate(component, len(pages))
        assert places is not None
        self.release(component, np.arange(first, stop))
        return places

    # ---- slots ---------------------------------------------------------------

    def slots(self, pages: Pages) -> Slots:
        """Slots (n, slots_per_page) of pages."""
        per_page = self.shape.slots_per_page
        if per_page == 1:  # as in most tables
            return pages.astype(np.int32).reshape(-1, 1)
        return (pages[:, None] * per_page + np.arange(per_page)).astype(np.int32)

    def pages(self, slots: Slots) -> Pages:
        """Inverse of ``slots``."""
        first = slots[:, 0].astype(np.int64)
        return first if self.shape.slots_per_page == 1 else first // self.shape.slots_per_page


class ArenaPool:
    """HostPool (see ``core.ports``) of one component of an arena."""

    def __init__(self, arena: Arena, component: int) -> None:
        self.arena = arena
        self.component = component

    def room(self, used: int) -> int:
        """See HostPool."""
        return self.arena.free_pages(self.component)

    def allocate(self, pages: int) -> Slots | None:
        """See HostPool."""
        found = self.arena.allocate(self.component, pages)
        return None if found is None else self.arena.slots(found)

    def release(self, slots: Slots) -> None:
        """See HostPool."""
        self.arena.release(self.component, self.arena.pages(slots))
