"""A child process of test_transfers: SGLang's own pools, moved there and back by our copies.

Prints a line for each round trip. The engine keeps process-wide state, so this does
not run inside the tests.
"""

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MHATokenToKVPoolFP4
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls

import sglang_ext_cpu.host_copies
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.page_copies import page_copies
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.transfer.job import Part

PAGE, PAGES, LAYERS = 16, 8, 3
LAYOUTS = (
    ("layer_first", "kernel"),
    ("page_first", "kernel"),
    ("page_head", "kernel"),
    ("layer_first", "direct"),
    ("page_first_direct", "direct"),
)
WIDER_KEYS = (("page_first", "kernel"), ("page_first_direct", "direct"))
"""What the engine has for models whose K is wider than their V."""
# layout, io backend, heads, K width, V width; rows of 64, 60, and 96 or 64 bytes
CASES = [
    *((*layout, 2, 8, 8) for layout in LAYOUTS),
    *((*layout, 3, 5, 5) for layout in LAYOUTS),
    *((*layout, 2, 12, 8) for layout in WIDER_KEYS),
]


def tokens(*pages: int) -> torch.Tensor:
    """Token indices of whole pages."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def part(host: tuple[int, ...], device: tuple[int, ...]) -> list[Part]:
    """What to copy."""
    return [Part(0, np.array(host), np.array(device))]


def round_trip(kind: str, layout: str, backend: str, heads: int, k_dim: int, v_dim: int) -> None:
    """Device pages 2 and 5 to the host and back into 6 and 1; no other byte moves."""
    pool = MHATokenToKVPool(
        PAGE * PAGES, PAGE, torch.float32, heads, k_dim, LAYERS, "cpu", False, v_head_dim=v_dim
    )
    info = pool.get_device_pool_infos()[0].buffer_info
    host = get_mha_host_pool_cls(info)(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=pool.size,
        start_layer=pool.start_layer,
        end_layer=pool.end_layer,
    )
    buffers = [*pool.k_buffer, *pool.v_buffer]
    for buffer in buffers:
        buffer.copy_(torch.randn(buffer.shape))
    before = [buffer.clone() for buffer in buffers]
    indices = SlotIndices(Geometry(PAGE, 2 * PAGE))
    copies = page_copies(kind, [(host, pool)], indices, backend, torch.device("cpu"))
    copies.prepare(part((7, 3), (2, 5))).backup()
    loads = copies.prepare(part((3, 7), (6, 1)))
    for layer in range(LAYERS):
        loads.load_layer(0, layer)
    for buffer, old in zip(buffers, before, strict=True):
        old[tokens(6, 1)] = old[tokens(5, 2)]
        assert torch.equal(buffer, old), f"{kind} {layout} {backend} {heads} {k_dim} {v_dim}"


def refuses_scales() -> bool:
    """Whether the engine's host pool stops at FP4 KV, whose scales it would not move."""
    pool = MHATokenToKVPoolFP4(
        PAGE * PAGES, PAGE, torch.uint8, 2, 32, LAYERS, "cpu", enable_memory_saver=False
    )
    info = pool.get_device_pool_infos()[0].buffer_info
    try:
        get_mha_host_pool_cls(info)(
            info, 2.0, 0, PAGE, "page_first", device_capacity_tokens=pool.size,
            start_layer=pool.start_layer, end_layer=pool.end_layer,
        )  # fmt: skip
    except ValueError as error:
        return "KV scale layout" in str(error)
    return False


def main() -> None:
    """Every case, and what came of it."""
    sglang_ext_cpu.host_copies.install()
    for case in CASES:
        try:
            for kind in ("engine", "kernels"):
                round_trip(kind, *case)
        except (AssertionError, IndexError, NameError, RuntimeError, ValueError) as error:
            print(*case, repr(error))
        else:
            print(*case, "ok")
    print("scales", "refused" if refuses_scales() else "accepted")


if __name__ == "__main__":
    main()
