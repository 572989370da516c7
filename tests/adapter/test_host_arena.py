"""The engine's host pools as views of one memory."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.pool_host import common

from sglang_ext.adapter.host_arena import ArenaMemory, registrations
from sglang_ext.core.host.arena import ArenaShape, shape_for
from sglang_ext.errors import StartupError
from tests.fixtures.zygote import Zygote


def test_pages_of_both_components_come_back_in_every_layout(zygote: Zygote) -> None:
    lines = zygote.lines("tests.adapter.arena_views")
    assert len(lines) == 7
    assert all(line.endswith("ok") for line in lines), lines


def assert_no_page_straddles(shape: ArenaShape, spans: list[tuple[int, int]]) -> None:
    """Spans are one behind the other, and a page in use lies in one of them, in each plane."""
    size = sum(shape.plane_bytes)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == size
    ends = np.array([stop for _, stop in spans])
    before = 0
    for plane, plane_bytes in enumerate(shape.plane_bytes):
        for component, page in enumerate(sizes[plane] for sizes in shape.page_bytes):
            for first, stop in zip(*shape.page_numbers(component), strict=True):
                starts = before + np.arange(first, stop) * page
                begin = np.searchsorted(ends, starts, side="right")
                end = np.searchsorted(ends, starts + page, side="left")
                assert (begin == end).all(), f"a page of {shape} lies in two of {spans}"
        before += plane_bytes


@given(
    unit=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    layers=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    pages=st.integers(70, 400),
    limit=st.floats(1.0, 40.0),
)
def test_no_page_straddles_two_registrations(
    unit: int,
    widths: tuple[int, int],
    layers: tuple[int, int],
    pages: int,
    limit: float,
) -> None:
    """K and V of any width, any budget, any limit on one registration."""
    sizes = tuple(tuple(unit * count * width for width in widths) for count in layers)
    shape = shape_for(pages * max(sum(size) for size in sizes), sizes, 1)
    most = int(max(shape.extent_bytes) * limit)
    spans = registrations(shape, most)
    assert_no_page_straddles(shape, spans)
    assert all(0 < stop - start <= most for start, stop in spans)
    # none could have gone on to the next extent
    assert len(spans) <= 2 + 2 * sum(shape.plane_bytes) // most
    with pytest.raises(StartupError, match="SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB"):
        registrations(shape, max(shape.extent_bytes) - 1)


@pytest.mark.parametrize("widths", [(192, 128), (144, 128), (80, 128), (128, 128)])
def test_the_memory_is_registered_and_unregistered_in_such_spans(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int]
) -> None:
    """Beyond what CUDA registers at once; the memory is never touched."""
    registered: dict[int, int] = {}

    def register(pointer: int, size: int, _: int) -> int:
        registered[pointer] = size
        return 0

    def unregister(pointer: int) -> int:
        del registered[pointer]
        return 0

    cudart = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(common.torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(
        common.HostTensorAllocator,
        "allocate",
        lambda _, dims, dtype, __: torch.empty(dims, dtype=dtype),
    )
    monkeypatch.setenv("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "1")
    sizes = tuple(tuple(16 * layers * 8 * width * 2 for width in widths) for layers in (7, 5))
    shape = shape_for(5 << 30, sizes, 1)
    memory = ArenaMemory(shape, pin=True)
    base = min(registered)
    spans = sorted((start - base, start - base + size) for start, size in registered.items())
    assert len(spans) > 4
    assert all(stop - start <= 1 << 30 for start, stop in spans)
    assert_no_page_straddles(shape, spans)
    memory.close()
    assert not registered
    memory.close()


def test_what_was_registered_before_a_failure_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[int] = []

    def register(pointer: int, _: int, __: int) -> int:
        registered.append(pointer)
        return int(len(registered) == 3)

    cudart = types.SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda pointer: registered.remove(pointer) or 0,
        cudaGetErrorString=lambda _: "out of memory",
    )
    monkeypatch.setattr(common.torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(
        common.HostTensorAllocator,
        "allocate",
        lambda _, dims, dtype, __: torch.empty(dims, dtype=dtype),
    )
    monkeypatch.setenv("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        ArenaMemory(shape_for(5 << 30, ((3 << 20, 2 << 20),), 1), pin=True)
    assert len(registered) == 1, "only the one that failed"
