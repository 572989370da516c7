"""A child process of test_host_arena: the engine's pools over one arena memory.

What the engine's copies write there the kernels read, and the other way round.

Prints a line for each case. The engine keeps process-wide state, so this does not run
inside the tests. With ``EXT_CPU_DEVICE=cuda`` its device is a GPU, and the copies are those that
it compiles there (see ``sglang_ext_cpu.gpu_copies``).
"""

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_arena import ArenaMemory, HostUsage, tensors_from
from sglang_ext.adapter.host_pools import size_to_ask_for
from sglang_ext.adapter.page_copies import page_copies
from sglang_ext.adapter.stacks import Stack, page_bytes
from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.transfer.job import Part
from sglang_ext_cpu import gpu_copies, host_copies, on_gpu

SOURCES, TARGETS = 8, 64
"""Device pages that are backed up, and behind them those that are loaded into."""
DEVICE = torch.device("cuda" if on_gpu() else "cpu")
# of full-attention and sliding-window layers
LAYERS = (2, 3)
HEADS = (2, 4) if on_gpu() else (2, 1)
# device page, layout, io backend, K width, V width
CASES = (
    (16, "page_first", "kernel", 8, 8),
    (16, "page_first_direct", "direct", 8, 8),
    (16, "page_head", "kernel", 8, 8),
    (1, "page_first", "kernel", 8, 8),
    (1, "page_first_direct", "direct", 8, 8),
    (64, "page_first_direct", "direct", 12, 8),
    (16, "page_first", "kernel", 12, 8),
)
# rows are multiples of 128 bytes; those of 1 KiB in pages of 64 go through Hopper's bulk copies
CASES_OF_GPU = (
    (16, "page_first", "kernel", 16, 16),
    (64, "page_first", "kernel", 64, 64),
    (1, "page_first", "kernel", 64, 64),
    (64, "page_first", "kernel", 128, 128),
)


def device_pool(
    tokens: int, page: int, layers: int, heads: int, widths: tuple[int, int]
) -> MHATokenToKVPool:
    """A pool with random contents."""
    pool = MHATokenToKVPool(
        tokens, page, torch.float32, heads, widths[0], layers, str(DEVICE), False,
        v_head_dim=widths[1],
    )  # fmt: skip
    for buffer in buffers(pool):
        buffer.copy_(torch.randn(buffer.shape))
    return pool


def buffers(pool: MHATokenToKVPool) -> list[torch.Tensor]:
    """K and V of every layer."""
    return [*pool.k_buffer, *pool.v_buffer]


class Component:
    """One kind of layers: a device pool, a host pool in the arena, and what is in it."""

    def __init__(
        self, memory: ArenaMemory, number: int, source: MHATokenToKVPool, geometry: Geometry
    ) -> None:
        self.memory, self.number, self.source = memory, number, source
        self.page_tokens = geometry.page_tokens
        self.indices = SlotIndices(geometry)
        self.held: dict[int, int] = {}

    def build(self, layout: str, backend: str, geometry: Geometry) -> None:
        """Make the engine's host pool."""
        source, shape = self.source, self.memory.arena.shape
        info = source.get_device_pool_infos()[0].buffer_info
        host = get_mha_host_pool_cls(info)(
            info,
            1.0,
            size_to_ask_for(shape, Stack(self.number, (source,), 0), geometry),
            geometry.device_page,
            layout,
            pin_memory=on_gpu(),
            device_capacity_tokens=source.size,
            start_layer=source.start_layer,
            end_layer=source.end_layer,
        )
        slots = shape.pages(self.number) * shape.slots_per_page
        assert host.page_num == slots, "the engine made a pool of another size"
        pools = [(host, source)]
        self.backups, self.loads = (
            page_copies(kind, pools, self.indices, backend, DEVICE)
            for kind in (("engine", "kernels") if self.number else ("kernels", "engine"))
        )

    def back_up(self, count: int) -> None:
        """Random device pages to the host, as many as fit."""
        arena = self.memory.arena
        pages = arena.allocate(self.number, min(count, arena.free_pages(self.number)))
        assert pages is not None
        sources = torch.randint(SOURCES, (len(pages),)).numpy()
        self.backups.prepare(self.part(pages, sources)).backup()
        if on_gpu():
            torch.cuda.synchronize()  # pages are moved by the CPU
        self.held.update(zip(pages.tolist(), sources.tolist(), strict=True))

    def forget(self, step: int) -> None:
        """Give every ``step``-th page back."""
        gone = list(self.held)[::step]
        self.held = {page: source for page, source in self.held.items() if page not in gone}
        self.memory.arena.release(self.number, np.array(gone, dtype=np.int64))

    def compact(self) -> bool:
        """Set an extent free; whether that was possible."""
        arena = self.memory.arena
        chosen = arena.to_vacate(self.number, lambda pages: self.held.keys() >= set(pages.tolist()))
        if len(chosen) == 0:
            return False
        places = arena.move(self.number, chosen)
        self.memory.move(self.number, arena.slots(chosen), arena.slots(places))
        sources = [self.held.pop(page) for page in chosen.tolist()]
        self.held.update(zip(places.tolist(), sources, strict=True))
        return True

    def check(self) -> None:
        """Load all pages; each is what was backed up."""
        pages = np.array(list(self.held), dtype=np.int64)
        sources = np.array(list(self.held.values()), dtype=np.int64)
        places = SOURCES + np.arange(len(pages))
        loads = self.loads.prepare(self.part(pages, places))
        for layer in range(self.source.layer_num):
            loads.load_layer(0, layer)
        for buffer in buffers(self.source):
            assert torch.equal(buffer[self.tokens(places)], buffer[self.tokens(sources)])

    def part(self, host: np.ndarray, device: np.ndarray) -> list[Part]:
        """Pages of the table as pages of the engine."""
        per_page = self.memory.arena.shape.slots_per_page
        on_device = (device[:, None] * per_page + np.arange(per_page)).reshape(-1)
        on_host = self.memory.arena.slots(host).reshape(-1).astype(np.int64)
        return [Part(0, on_host, on_device)]

    def tokens(self, pages: np.ndarray) -> torch.Tensor:
        """Token indices of device pages."""
        offsets = np.arange(self.page_tokens)
        return torch.from_numpy((pages[:, None] * self.page_tokens + offsets).reshape(-1))


def share(page: int, layout: str, backend: str, *widths: int) -> None:
    """Both components fill the memory in turns; every page comes back as it was, also after
    pages were moved, and the memory is no larger than it was said to be."""
    geometry = Geometry(page, 100)
    tokens = (SOURCES + TARGETS) * geometry.page_tokens
    pools = [
        device_pool(tokens, page, layers, heads, widths)
        for layers, heads in zip(LAYERS, HEADS, strict=True)
    ]
    sizes = tuple(page_bytes(pool, geometry) for pool in pools)
    budget = 40 * sum(sizes[0])
    memory = ArenaMemory(shape_for(budget, sizes, geometry.slots_per_page), pin=on_gpu())
    assert sum(memory.arena.shape.plane_bytes) <= budget
    usage = HostUsage(memory.arena, geometry.page_tokens)
    components = [Component(memory, number, pool, geometry) for number, pool in enumerate(pools)]
    with tensors_from(memory):
        for component in components:
            component.build(layout, backend, geometry)
    assert usage.available_size() == usage.logical_size
    moved = False
    for number, count, step in ((0, 20, 2), (1, 99, 3), (0, 99, 2), (1, 99, 2), (0, 99, 5)):
        components[number].back_up(count)
        assert usage.available_size() < usage.logical_size
        components[number].forget(step)
        moved |= components[number].compact()
        for component in components:
            component.check()
    assert moved, "nothing was ever moved"
    memory.close()


def main() -> None:
    """Every case, and what came of it."""
    (gpu_copies if on_gpu() else host_copies).install()
    for case in CASES_OF_GPU if on_gpu() else CASES:
        try:
            share(*case)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            print(*case, repr(error))
        else:
            print(*case, "ok")


if __name__ == "__main__":
    main()
