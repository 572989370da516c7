"""A child process of test_deepseek_v4: pages of the engine's pools, moved between the tiers.

Every plane of a page has to come along. Prints a line for each case; the engine keeps process-wide
state, so this does not run inside the tests.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt import runtime_context
from sglang.srt.environ import envs
from sglang.srt.mem_cache import deepseek_v4_memory_pool as engine
from sglang.srt.mem_cache.pool_host import base

from sglang_ext.adapter import deepseek_v4
from sglang_ext.adapter.byte_pages import ByteHost, ByteLayers, rows_by_page
from sglang_ext.adapter.deepseek_v4 import DeepSeekV4Kv
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.planning.compressed import CompressedShape
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import Part
from tests.adapter.deepseek_v4 import (
    PAGE,
    as_bytes,
    content,
    device_pool,
    draft_pool,
    holds,
    paged_v41_pool,
    parameters,
    rows,
    set_options,
    write,
)

CPU = torch.device("cpu")
GEOMETRY = Geometry(PAGE, 128)
SOURCES, TARGETS = np.array([1, 3, 2]), np.array([6, 4, 5])


class Tiers:
    """A model, maybe with drafts, its host memory, and what copies."""

    def __init__(self, pool: Any, drafts: tuple[Any, ...]) -> None:
        self.pools = [pool, *drafts]
        params = parameters(pool, mtp_draft_device_pools=drafts)
        self.kv = DeepSeekV4Kv(params, pool, GEOMETRY)
        self.host = self.kv.build_host()
        self.copies = self.host.copies("kernels", SlotIndices(GEOMETRY), "", CPU)
        assert self.page_bytes() == self.kv.page_bytes, "the budget does not count all bytes"
        assert sum(self.host.memory.arena.shape.plane_bytes) <= 100_000_000, "--hicache-size 0.1"

    def compare_with_plan(self) -> None:
        """What ``sglang-ext plan`` says of such a model."""
        pool = self.pools[0]
        ratios = [pool.compression_ratios[n] for n in range(pool.start_layer, pool.end_layer)]
        planned = CompressedShape(*map(ratios.count, (4, 128, 0))).page_planes(PAGE)
        assert self.page_bytes() == tuple(map(sum, planned)), "a plan says something else"

    def page_bytes(self) -> tuple[int, int]:
        """Of each component, as the engine's kernels find them."""
        full, window = (
            sum(row.nbytes for pool in self.pools for row in rows(pool, component, 1))
            for component in (FULL, WINDOW)
        )
        return full, window

    def write(self, component: int, page: int, tag: int) -> None:
        for number, pool in enumerate(self.pools):
            write(pool, component, page, tag + 1000 * number)

    def holds(self, component: int, page: int, tag: int) -> bool:
        return all(
            holds(pool, component, page, tag + 1000 * number)
            for number, pool in enumerate(self.pools)
        )

    def parts(self, component: int, host: np.ndarray, device: np.ndarray) -> list[Part]:
        return [Part(pool, host, device) for pool in self.host.of_components[component]]


def round_trip(tiers: Tiers) -> None:
    """Pages of both components to the host, elsewhere on it, and back to other places."""
    memory, arena = tiers.host.memory, tiers.host.memory.arena
    schedule = tiers.host.schedule
    loaded = [layer for gate in schedule for layer in gate]
    assert len(set(loaded)) == len(loaded)
    held = {}
    for component in (FULL, WINDOW):
        for page in (*SOURCES, *TARGETS):
            tiers.write(component, page, 10 * component + page)
        pages = arena.allocate(component, 3)
        assert pages is not None
        tiers.copies.prepare(tiers.parts(component, pages, SOURCES)).backup()
        held[component] = pages
    for component, pages in held.items():
        places = arena.allocate(component, 3)
        assert places is not None
        memory.move(component, arena.slots(pages), arena.slots(places))
        arena.release(component, pages)
        held[component] = places
    for component, pages in held.items():
        loads = tiers.copies.prepare(tiers.parts(component, pages, TARGETS))
        for gate in schedule:
            for layer in gate:
                loads.load_layer(*layer)
        for source, target in zip(SOURCES, TARGETS, strict=True):
            tag = 10 * component + source
            assert tiers.holds(component, target, tag), "a plane was left behind"
            assert tiers.holds(component, source, tag), "a page was written that is another's"
        stored(tiers, component, pages)
        arena.release(component, pages)


def stored(tiers: Tiers, component: int, pages: np.ndarray) -> None:
    """An object of storage is all that a page is."""
    pool = list(tiers.host.for_storage().values())[component]
    indices = SlotIndices(GEOMETRY).tokens(tiers.host.memory.arena.slots(pages))
    _, sizes = pool.get_page_buffer_meta(indices)
    assert sum(sizes) == len(pages) * tiers.page_bytes()[component], "bytes are missing"


def each_layer_waits_for_its_own(tiers: Tiers) -> None:
    """What is loaded before a layer's gate is what that layer reads."""
    arena = tiers.host.memory.arena
    target = tiers.pools[0]
    for component in (FULL, WINDOW):
        tiers.write(component, 1, 77)
        pages = arena.allocate(component, 1)
        assert pages is not None
        tiers.copies.prepare(tiers.parts(component, pages, SOURCES[:1])).backup()
        tiers.write(component, 4, 88)
        loads = tiers.copies.prepare(tiers.parts(component, pages, TARGETS[1:2]))
        for number, gate in enumerate(tiers.host.schedule):
            for layer in gate:
                loads.load_layer(*layer)
            for position in of_layer(target, component, number):
                row = rows(target, component, 4)[position]
                same = torch.equal(as_bytes(row), content(77, position, row.nbytes))
                assert same, f"layer {number} reads what is not there yet"
        arena.release(component, pages)


def of_layer(pool: Any, component: int, number: int) -> list[int]:
    """Which of ``rows`` a layer of the stage reads."""
    stage = range(pool.start_layer, pool.end_layer)
    ratios = [pool.compression_ratios[layer] for layer in stage]
    mine, place = ratios[number], ratios[: number + 1].count(ratios[number]) - 1
    if component == WINDOW:
        fours = ratios.count(4)
        states = [len(ratios) + place, len(ratios) + fours + place] if mine == 4 else []
        return [number, *states]
    if mine == 0:
        return []
    first = 0
    for ratio, kv_pool in pool.kv_pools.items():
        count = len(kv_pool.kv_buffer)
        if ratio == mine:
            # of the layer that keeps it
            first += pool.layer_mapping[stage[number]].compress_layer_id
            return [first, first + count] if ratio in pool.index_pools else [first]
        first += count * (1 + (ratio in pool.index_pools))
    raise AssertionError("a ratio has no pool")


def states_are_not_copied() -> None:
    original = ByteHost.of_components.fget
    assert original is not None

    def without(self: ByteHost) -> Any:
        full, window = original(self)
        return full, window[:1]

    ByteHost.of_components = property(without)  # type: ignore[method-assign, assignment]


def a_ratio_is_not_loaded() -> None:
    original = ByteHost.schedule.fget
    assert original is not None

    def without(self: ByteHost) -> Any:
        return [[layer for layer in gate if layer[0] != 2] for gate in original(self)]

    ByteHost.schedule = property(without)  # type: ignore[method-assign, assignment]


def layers_come_one_gate_later() -> None:
    schedule = ByteHost.schedule.fget
    assert schedule is not None
    original = schedule

    def late(self: ByteHost) -> Any:
        *gates, last = original(self)
        return [[], *gates[:-1], [*gates[-1], *last]]

    ByteHost.schedule = property(late)  # type: ignore[method-assign, assignment]


def planes_lie_on_each_other() -> None:
    original = ByteHost.planes.fget
    assert original is not None

    def same(self: ByteHost) -> Any:
        found = original(self)
        for pool in found:
            for plane in pool[1:]:
                # the first layer of every plane begins where the pool's first one does
                object.__setattr__(plane, "host", _begin(plane.host, pool[0].host))
        return found

    ByteHost.planes = property(same)  # type: ignore[method-assign, assignment]


def _begin(host: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return host.as_strided(host.shape, host.stride(), at.storage_offset())


def the_index_is_not_paid_for() -> None:
    def first(self: ByteLayers) -> int:
        return len(self.before) * self.widths[0]

    ByteLayers.page_bytes = property(first)  # type: ignore[method-assign, assignment]


def states_are_those_of_the_next_page() -> None:
    def shifted(buffer: torch.Tensor, rows: int = 1) -> torch.Tensor:
        return rows_by_page(buffer[rows:] if rows > 1 else buffer, rows)

    deepseek_v4.rows_by_page = shifted


def a_moved_page_is_torn() -> None:
    move = ArenaMemory.move

    def torn(self: ArenaMemory, component: int, source: Any, target: Any) -> None:
        move(self, component, source[:-1], target[:-1])

    ArenaMemory.move = torn  # type: ignore[method-assign]


def with_short_rows() -> Any:
    """Where kernels read windows in pages of 64 tokens: four rows of the buffer are one page."""
    engine.get_platform = lambda: SimpleNamespace(is_sm120=True)
    with envs.SGLANG_OPT_SM120_DIRECT_SWA_KV.override(True):
        pool = device_pool()
    engine.get_platform = runtime_context.get_platform
    assert pool.swa_kv_pool.page_size == 64
    return pool


def with_kernels(**options: Any) -> Any:
    """Pools as these options of the engine's kernels want them."""
    with runtime_context.get_exec().kernel.override(**options):
        return device_pool()


CASES: dict[str, Any] = {
    "model": lambda: (device_pool(), ()),
    "stage": lambda: (device_pool(ratios=(4, 4, 0, 4, 128), first=2), ()),
    "fp4 index": lambda: (with_kernels(enable_deepseek_v4_fp4_indexer=True), ()),
    "uniform fp8": lambda: (with_kernels(dsv4_attn_backend="trtllm"), ()),
    "drafts": lambda: (device_pool(), (draft_pool(), draft_pool(layers=2))),
    "one ratio": lambda: (device_pool(ratios=(0, 4)), ()),
    "states of another type": lambda: (device_pool(c4_state_dtype=torch.bfloat16), ()),
    "short rows": lambda: (with_short_rows(), ()),
    "V4.1": lambda: (paged_v41_pool(16 * PAGE, 8 * PAGE), ()),
}
AS_PLANNED = ("model", "stage", "one ratio", "short rows")
"""Those whose rows are as wide as they are by default."""


def main() -> None:
    """Every case, and what came of it. With a bug, the plain ones."""
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40  # whatever else is running here
    set_options()
    bugs = sys.argv[1:]
    for bug in bugs:
        globals()[bug]()
    for name in ("model", "drafts") if bugs else CASES:
        try:
            tiers = Tiers(*CASES[name]())
            round_trip(tiers)
            each_layer_waits_for_its_own(tiers)
            if name in AS_PLANNED:
                tiers.compare_with_plan()
            tiers.host.close()
        except (AssertionError, IndexError, RuntimeError, ValueError, TypeError) as error:
            print(name, repr(error))
        else:
            print(name, "ok")


if __name__ == "__main__":
    main()
