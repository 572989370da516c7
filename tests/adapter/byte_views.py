"""A child process of test_deepseek_v4: rows of bytes of any width, by both kernels.

Prints a line for each; Triton's is interpreted.
"""

import numpy as np
import torch
from sglang.srt.mem_cache.pool_host import base

from sglang_ext.adapter.byte_pages import ByteHost, ByteLayers, in_order, sizes_of
from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.core.host.arena import shape_for
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.kernels.page_copy.cpu import CpuPageCopier
from sglang_ext.kernels.page_copy.gpu import GpuPageCopier
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import Part
from sglang_ext.transfer.kernel_copies import KernelCopies

PAGES = 8
SHAPES = (
    (FULL, (1, 3), (64, 24)),
    (FULL, (2,), (8, 8, 2048)),
    (FULL, (0, 2, 3), (1, 3)),
    (WINDOW, (0, 1, 2, 3), (96,)),
    (WINDOW, (1, 3), (5, 40)),
)
"""Component, layers of the model, width of each plane."""


def host(widths_of_words: int) -> ByteHost:
    """Random rows on the device, and a memory for them.

    Args:
        widths_of_words: what every width is a multiple of.
    """
    layers = in_order(
        [
            ByteLayers(component, "", before, tuple(
                tuple(
                    torch.randint(256, (PAGES, width * widths_of_words), dtype=torch.uint8)
                    for _ in before
                )
                for width in widths
            ))
            for component, before, widths in SHAPES
        ]
    )  # fmt: skip
    sizes = sizes_of(layers)
    memory = ArenaMemory(shape_for(100 * max(sizes), tuple((s,) for s in sizes), 1), pin=False)
    return ByteHost(memory, layers, 4, Geometry(16, 16), {})


def round_trip(made: ByteHost, copies: KernelCopies) -> None:
    """Pages of both components, in one job each way."""
    sources, targets = np.array([1, 2, 5]), np.array([4, 7, 0])
    arena = made.memory.arena
    pages = [arena.allocate(component, 3) for component in (FULL, WINDOW)]
    assert pages[0] is not None and pages[1] is not None
    before = [layer.clone() for pool in made.planes for plane in pool for layer in plane.layers]
    parts = {
        device: [
            Part(pool, pages[of], number)
            for of, pools in enumerate(made.of_components)
            for pool in pools
        ]
        for device, number in (("from", sources), ("to", targets))
    }
    copies.prepare(parts["from"]).backup()
    job = copies.prepare(parts["to"])
    for gate in made.schedule:
        for layer in gate:
            job.load_layer(*layer)
    after = [layer for pool in made.planes for plane in pool for layer in plane.layers]
    for old, new in zip(before, after, strict=True):
        old[targets] = old[sources]
        assert torch.equal(old, new), "a row came back with other bytes"


def main() -> None:
    """Both kernels; rows of whole words, and odd ones."""
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40
    for name, copier in (("cpu", CpuPageCopier), ("triton", GpuPageCopier)):
        for widths in (1, 8):
            made = host(widths)
            planes = made.planes
            try:
                round_trip(made, KernelCopies(copier(planes), len(planes)))
            except AssertionError as error:
                print(name, widths, repr(error))
            else:
                print(name, widths, "ok")


if __name__ == "__main__":
    main()
