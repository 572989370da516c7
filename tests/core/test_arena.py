"""The arena by itself: two components, one memory, no byte twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ext.core.host.arena import NOBODY, Arena, ArenaShape, shape_for

PAGE_BYTES = st.tuples(st.integers(1, 7), st.integers(1, 7))
CALLS = st.lists(
    st.tuples(st.sampled_from(["take", "give", "vacate"]), st.integers(0, 1), st.integers(1, 9)),
    max_size=60,
)


def arena(extents: int, extent_bytes: int, page_bytes: tuple[int, int], slots: int = 1) -> Arena:
    pages = tuple((size,) for size in page_bytes)
    return Arena(ArenaShape(extents, (extent_bytes,), pages, slots))


class Ledger:
    """What the arena has handed out, byte by byte."""

    def __init__(self, page_bytes: tuple[int, int], extents: int, pages: int) -> None:
        self.page_bytes = page_bytes
        self.extent_bytes = pages * max(page_bytes) + 1
        self.arena = arena(extents, self.extent_bytes, page_bytes)
        self.pages: tuple[list[int], list[int]] = ([], [])

    def check(self) -> None:
        taken = np.zeros(len(self.arena.owner) * self.extent_bytes, dtype=int)
        for component, size in enumerate(self.page_bytes):
            for page in self.pages[component]:
                first, last = page * size, (page + 1) * size - 1
                extent = first // self.extent_bytes
                assert extent == last // self.extent_bytes, "a page in two extents"
                assert self.arena.owner[extent] == component
                taken[first : last + 1] += 1
            assert self.arena.taken(component) == len(self.pages[component])
        usage = self.arena.usage()
        assert sum(usage.values()) == len(taken)
        assert usage["full"] + usage["window"] == taken.sum()
        assert taken.max(initial=0) <= 1, "a byte belongs to two pages"
        used = {
            page * s // self.extent_bytes
            for c, s in zip(self.pages, self.page_bytes, strict=True)
            for page in c
        }
        assert set(np.flatnonzero(self.arena.owner != NOBODY).tolist()) == used, (
            "an empty extent is kept"
        )

    def take(self, component: int, count: int) -> None:
        room = self.arena.free_pages(component)
        got = self.arena.allocate(component, count)
        assert (got is not None) == (count <= room)
        if got is not None:
            self.pages[component].extend(got.tolist())
            assert self.arena.free_pages(component) == room - count

    def give(self, component: int, count: int) -> None:
        mine = self.pages[component]
        given = [mine.pop(count % len(mine)) for _ in range(min(count, len(mine)))]
        if given:
            self.arena.release(component, np.array(given))

    def vacate(self, component: int, skip: int) -> None:
        """Every ``skip``-th page may not be moved."""
        mine = np.array(self.pages[component], dtype=np.int64)
        movable = np.delete(mine, slice(skip - 1, None, skip + 1))
        free = self.arena.free_extents
        chosen = self.arena.to_vacate(component, lambda pages: np.isin(pages, movable).all())
        if len(chosen) == 0:
            return
        assert set(chosen.tolist()) <= set(movable.tolist())
        places = self.arena.move(component, chosen)
        assert self.arena.free_extents == free + 1
        self.pages[component][:] = [*np.setdiff1d(mine, chosen).tolist(), *places.tolist()]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(page_bytes=PAGE_BYTES, extents=st.integers(0, 6), pages=st.integers(2, 5), calls=CALLS)
def test_no_byte_belongs_to_two_pages(
    page_bytes: tuple[int, int], extents: int, pages: int, calls: list[tuple[str, int, int]]
) -> None:
    ledger = Ledger(page_bytes, extents, pages)
    for call, component, number in calls:
        getattr(ledger, call)(component, number)
        ledger.check()
    ledger.arena.clear()
    assert ledger.arena.free_extents == extents


def test_the_fullest_extents_are_filled_first() -> None:
    memory = arena(4, 8, (2, 4))
    pages = memory.allocate(0, 12)
    assert pages is not None
    memory.release(0, pages[[0, 4, 5, 6]])
    more = memory.allocate(0, 1)
    assert more is not None
    assert more.tolist() == [0]
    assert memory.to_vacate(0, lambda pages: True).size == 0, "three holes do not hold four pages"
    assert memory.free_extents == 1


def test_a_whole_extent_worth_of_holes_sets_one_free() -> None:
    memory = arena(3, 8, (2, 4))
    pages = memory.allocate(0, 12)
    assert pages is not None
    memory.release(0, pages[[0, 1, 4, 8]])
    chosen = memory.to_vacate(0, lambda pages: True)
    assert chosen.tolist() == [2, 3], "the emptiest one moves"
    assert memory.move(0, chosen).tolist() == [4, 8]
    assert memory.free_extents == 1
    assert memory.free_pages(1) == 2


def test_slots_are_the_pages_bytes_in_order() -> None:
    memory = arena(2, 64, (4, 8), 4)
    pages = np.array([3, 0])
    assert memory.slots(pages).tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert memory.pages(memory.slots(pages)).tolist() == [3, 0]


def test_an_extent_must_hold_two_of_the_larger_pages() -> None:
    with pytest.raises(ValueError, match="too small"):
        arena(2, 15, (4, 8))


def test_a_page_given_back_twice_is_noticed() -> None:
    memory = arena(1, 16, (4, 8))
    pages = memory.allocate(1, 1)
    assert pages is not None
    memory.release(1, pages)
    with pytest.raises(AssertionError, match="freed again"):
        memory.release(1, pages)


@given(
    budget=st.integers(1, 10**9),
    sizes=st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)),
    planes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
@settings(deadline=None, derandomize=True)
def test_a_memory_is_cut_within_its_budget(
    budget: int, sizes: tuple[int, int], planes: tuple[int, int]
) -> None:
    page_bytes = tuple(tuple(size * plane for plane in planes) for size in sizes)
    shape = shape_for(budget, page_bytes, 1)
    assert sum(shape.plane_bytes) <= budget
    assert sum(shape.plane_bytes) + sum(shape.extent_bytes) > budget, "memory is left over"
    assert shape.extents <= 2 * 1024
    for component, pages in enumerate(page_bytes):
        first, stop = shape.page_numbers(component)
        assert (stop > first).all()
        for page, extent in zip(pages, shape.extent_bytes, strict=True):
            start = np.arange(shape.extents) * extent
            assert (first * page >= start).all()
            assert (stop * page <= start + extent).all()


def test_pages_of_equal_size_leave_nothing_over() -> None:
    shape = shape_for(10**6, ((100, 100), (50, 50)), 1)
    for component, per_extent in ((0, 16), (1, 32)):
        first, stop = shape.page_numbers(component)
        assert set((stop - first).tolist()) == {per_extent}


def test_components_that_divide_k_and_v_differently_cannot_share() -> None:
    with pytest.raises(ValueError, match="divide K and V differently"):
        shape_for(10**6, ((100, 100), (100, 50)), 1)


def test_five_planes_of_different_widths_are_one_memory() -> None:
    """A component is any number of planes: a draft model's KV is more of them, and no other case.
    Pages of both components divide every plane alike, so one extent is one in each of them."""
    widths = (64, 32, 16, 3, 1)
    pages = tuple(12 * width for width in widths), tuple(7 * width for width in widths)
    shape = shape_for(100_000, pages, 1)
    assert sum(shape.plane_bytes) <= 100_000
    assert all(pages > 0 for pages in (shape.pages(0), shape.pages(1)))
    for component, sizes in enumerate(shape.page_bytes):
        first, stop = shape.page_numbers(component)
        for size, extent in zip(sizes, shape.extent_bytes, strict=True):
            starts = np.arange(shape.extents) * extent
            assert (first * size >= starts).all()
            assert (stop * size <= starts + extent).all()


@given(
    budget=st.integers(10**9, 10**11),
    sizes=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    own=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@settings(deadline=None, derandomize=True)
def test_a_plane_may_be_of_one_component_alone(
    budget: int, sizes: tuple[int, int], own: tuple[int, int]
) -> None:
    """Drafts have layers of another shape, with a page of one component."""
    unit = 16
    full = unit * sizes[0], unit * sizes[0], unit * (own[0] + 1), 0
    window = unit * sizes[1], unit * sizes[1], 0, unit * (own[1] + 1)
    shape = shape_for(budget, (full, window), 1)
    assert budget - sum(shape.extent_bytes) < sum(shape.plane_bytes) <= budget
    assert all(extent % unit == 0 for extent in shape.extent_bytes)
    for component, pages in enumerate(shape.page_bytes):
        first, stop = shape.page_numbers(component)
        assert (stop > first).all()
        for page, extent in zip(pages, shape.extent_bytes, strict=True):
            start = np.arange(shape.extents) * extent
            assert page == 0 or (first * page >= start).all()
            assert (stop * page <= start + extent).all()
    memory = Arena(shape)
    for component in (0, 1):
        pages_of_one = memory.allocate(component, 1)
        assert pages_of_one is not None
        assert memory.usage()[("full", "window")[component]] == sum(shape.page_bytes[component])
