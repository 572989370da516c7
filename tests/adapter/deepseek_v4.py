"""DeepSeek-V4's pools of the engine on a CPU, and what a page of each component is, by the engine's
own arithmetic and not by ours."""

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
from sglang.srt.runtime_context import get_exec
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_ext.storage.port import FULL

PAGE = 256
RATIOS = (0, 4, 128, 4, 128)
"""Of each layer: a window alone, two of each kind of compression."""
WINDOW_TOKENS = 128


def set_options(**options: Any) -> ServerArgs:
    """Options of a server with a host tier."""
    arguments = ServerArgs(
        **{
            "model_path": "dummy",
            "page_size": PAGE,
            "attention_backend": "torch_native",
            "enable_hierarchical_cache": True,
            "hicache_size": 0.1,
            "hicache_mem_layout": "page_first",
            **options,
        }
    )
    # what the engine takes from the model's configuration, which is not there
    arguments._mamba_cache_chunk_size = PAGE
    set_global_server_args_for_scheduler(arguments)
    return arguments


def device_pool(
    tokens: int = 16 * PAGE,
    window_tokens: int = 8 * PAGE,
    ratios: tuple[int, ...] = RATIOS,
    first: int = 0,
    **options: Any,
) -> DeepSeekV4TokenToKVPool:
    """The engine's pool.

    Args:
        tokens, window_tokens: with compressed KV, with KV of windows.
        ratios: of all layers of the model.
        first: layer of this stage; all behind it are on it.
        options: of the pool, by the engine's names.
    """
    return DeepSeekV4TokenToKVPool(
        **{
            "max_num_reqs": 2,
            "swa_size": window_tokens,
            "c4_size": tokens // 4,
            "c128_size": tokens // 128,
            "c4_state_pool_size": window_tokens // PAGE * 8,
            "c128_state_pool_size": 2 * 128,
            "page_size": PAGE,
            "swa_page_size": PAGE,
            "dtype": torch.float8_e4m3fn,
            "c4_state_dtype": torch.float32,
            "c128_state_dtype": torch.float32,
            "qk_nope_head_dim": 448,
            "qk_rope_head_dim": 64,
            "indexer_head_dim": 128,
            "layer_num": len(ratios) - first,
            "device": "cpu",
            "enable_memory_saver": False,
            "compression_ratios": list(ratios),
            "sliding_window": WINDOW_TOKENS,
            "start_layer": first,
            "end_layer": len(ratios),
            "full_size": tokens,
            **options,
        }
    )


def draft_pool(window_tokens: int = 8 * PAGE, layers: int = 1) -> DeepSeekV4TokenToKVPool:
    """Of MTP layers."""
    return device_pool(0, window_tokens, (0,) * layers, is_draft_worker=True)


V41_RATIOS = (0, 1, 1, 2, 2, 1)
V41_SOURCES = (1, 3)
"""Layers that keep what those behind them read, too."""


def paged_v41_pool(tokens: int, window_tokens: int) -> DeepSeekV4TokenToKVPool:
    """V4.1, with windows in pages."""
    return device_pool(tokens, window_tokens, V41_RATIOS, kv_source_layers=V41_SOURCES)


def replayed_pool(tokens: int, window_tokens: int) -> DeepSeekV4TokenToKVPool:
    """V4.1, with windows that are computed again."""
    with get_exec().features.override(enable_encoder_swa_bounded_replay=True):
        return paged_v41_pool(tokens, window_tokens)


def draft_rings(window_tokens: int) -> tuple[DeepSeekV4TokenToKVPool, ...]:
    """Of drafts of such a model."""
    with get_exec().features.override(enable_encoder_swa_bounded_replay=True):
        return (draft_pool(window_tokens, layers=3),)


def parameters(pool: DeepSeekV4TokenToKVPool, tokens: int = 16 * PAGE, **more: Any) -> Any:
    """What the engine passes to a cache, with an allocator of its own."""
    allocator = SWATokenToKVPoolAllocator(
        size=tokens,
        size_swa=pool.swa_size,
        page_size=PAGE,
        dtype=torch.uint8,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )
    return SimpleNamespace(
        page_size=PAGE,
        token_to_kv_pool_allocator=allocator,
        pp_cache_group=None,
        **{"mtp_draft_device_pools": (), "sidecar_draft_device_pools": (), **more},
    )


def rows(pool: DeepSeekV4TokenToKVPool, component: int, page: int) -> list[torch.Tensor]:
    """All bytes of a page of a component: what the engine's kernels find there. Views."""
    found: list[torch.Tensor] = []
    first, stop = page * PAGE, (page + 1) * PAGE
    if component == FULL:
        for ratio, kv_pool in pool.kv_pools.items():
            slots = range(first // ratio, stop // ratio)
            found += _slots(kv_pool.kv_buffer, slots, PAGE // ratio)
            if ratio in pool.index_pools:
                index = pool.index_pools[ratio]
                found += _slots(index.contiguous_page_row_buffers(), slots, index.page_size)
        return found
    found += _slots(pool.swa_kv_pool.kv_buffer, range(first, stop), pool.swa_kv_pool.page_size)
    for states in (pool.compress_state_pools, pool.indexer_compress_state_pools):
        for state in states:
            if state is not None and state.ratio == 4:
                places = state.translate_from_swa_loc_to_state_loc(torch.arange(first, stop))
                begin, end = int(places.min()), int(places.max()) + 1
                found.append(state.kv_score_buffer.kv_score[begin:end])
    return found


def _slots(buffers: list[torch.Tensor], slots: range, page_slots: int) -> list[torch.Tensor]:
    begin, end = slots.start // page_slots, slots.stop // page_slots
    assert end > begin, "whole pages of the buffer"
    return [buffer[begin:end] for buffer in buffers]


def write(pool: DeepSeekV4TokenToKVPool, component: int, page: int, tag: int) -> None:
    """Fill a page with bytes that no other tag, layer or place in it has."""
    for number, row in enumerate(rows(pool, component, page)):
        as_bytes(row).copy_(content(tag, number, row.nbytes))


def holds(pool: DeepSeekV4TokenToKVPool, component: int, page: int, tag: int) -> bool:
    """Whether every byte of a page is that of its tag."""
    return all(
        torch.equal(as_bytes(row), content(tag, number, row.nbytes))
        for number, row in enumerate(rows(pool, component, page))
    )


def as_bytes(row: torch.Tensor) -> torch.Tensor:
    """A view, (bytes,)."""
    return row.view(torch.uint8).view(-1)


def content(tag: int, number: int, size: int) -> torch.Tensor:
    """Bytes of a row. The period is a prime: no two rows or pages of rows agree."""
    count = torch.arange(size, dtype=torch.int64)
    return ((count * 31 + number * 101 + tag * 17 + count // 251 * (tag % 251 + 1)) % 251).to(
        torch.uint8
    )
