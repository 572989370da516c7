"""Models whose KV the replayed caches hold, each with pools of the engine for a few of its layers.

A model has as many tokens in its pools as on a device, and the least bytes of each that the engine
takes, so millions of them fit into a small machine.
"""

from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from launch.bench.trace_copies import FULL, WINDOW
from sglang_ext.planning.compressed import CompressedShape
from sglang_ext.planning.model import COMPRESSED, PRESETS, ModelShape, Shape

_HEAD_DIM = 8
_ROW_BYTES = 2 * _HEAD_DIM * torch.float16.itemsize
"""K and V of a token in one kind of layers."""
_C4, _C128 = 4, 128
_STATES = 8
"""Of the compressors of C4 for each page."""


class TraceModel(Protocol):
    """A model, and what stands for it in a replay.

    Attributes:
        shape: whose bytes are meant.
        window_share: of the device's tokens, that have KV of windows.
        dtype: of the pools.
        counted: stock's host pools that say how many tokens are copied, by kind of KV.
        copied: whether the engine's copies between its tiers run on a CPU.
    """

    shape: Shape
    window_share: float
    dtype: torch.dtype
    counted: dict[str, PoolName]
    copied: bool

    def pool(self, tokens: int, window_tokens: int, page: int) -> BaseSWAKVPool:
        """Of so many tokens of each component; of ``page`` tokens each."""
        ...

    def host_options(self, host_bytes: int, tokens: int, window_tokens: int) -> dict[str, Any]:
        """The engine's options for a host of so many bytes of the model, beside a device of so
        many tokens of each component."""
        ...


class KeysAndValues:
    """TraceModel with K and V, and as many bytes of a token in either kind of layers."""

    window_share = 0.5
    dtype = torch.float16
    counted = {FULL: PoolName.KV, WINDOW: PoolName.SWA}  # noqa: RUF012
    copied = True

    def __init__(self, shape: ModelShape) -> None:
        assert shape.full_token_bytes == shape.swa_token_bytes
        self.shape: Shape = shape

    def pool(self, tokens: int, window_tokens: int, page: int) -> SWAKVPool:
        """See TraceModel."""
        return SWAKVPool(
            size=tokens,
            size_swa=window_tokens,
            page_size=page,
            dtype=self.dtype,
            head_num=1,
            head_dim=_HEAD_DIM,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            device="cpu",
        )

    def host_options(self, host_bytes: int, tokens: int, window_tokens: int) -> dict[str, Any]:
        """See TraceModel."""
        # ServerArgs takes 10^9 bytes
        size = host_bytes * _ROW_BYTES / self.shape.full_token_bytes / 1e9
        return {"hicache_size": size, "hicache_io_backend": "kernel"}


class CompressedPages:
    """TraceModel of DeepSeek-V4: one layer of each ratio of compression. The engine takes no
    smaller rows than the model's. The proportion of a page to one of windows is nearly that of the
    model."""

    window_share = CompressedShape.default_swa_ratio
    dtype = torch.uint8
    counted = {FULL: PoolName.DEEPSEEK_V4_C4, WINDOW: PoolName.SWA}  # noqa: RUF012
    copied = False

    def __init__(self, shape: CompressedShape) -> None:
        self.shape: Shape = shape

    def pool(self, tokens: int, window_tokens: int, page: int) -> DeepSeekV4TokenToKVPool:
        """See TraceModel."""
        return DeepSeekV4TokenToKVPool(
            max_num_reqs=2,
            full_size=tokens,
            swa_size=window_tokens,
            c4_size=tokens // _C4,
            c128_size=tokens // _C128,
            c4_state_pool_size=window_tokens // page * _STATES,
            c128_state_pool_size=2 * _C128,
            page_size=page,
            swa_page_size=page,
            dtype=torch.float8_e4m3fn,
            c4_state_dtype=torch.float32,
            c128_state_dtype=torch.float32,
            qk_nope_head_dim=448,
            qk_rope_head_dim=64,
            indexer_head_dim=128,
            sliding_window=self.shape.window - 1,
            compression_ratios=[_C4, _C128],
            layer_num=2,
            start_layer=0,
            end_layer=2,
            device="cpu",
            enable_memory_saver=False,
        )

    def host_options(self, host_bytes: int, tokens: int, window_tokens: int) -> dict[str, Any]:
        """See TraceModel. Stock's has no other size than this."""
        shape = self.shape
        device = tokens * shape.full_token_bytes + window_tokens * shape.swa_token_bytes
        return {
            "hicache_ratio": host_bytes / device,
            "hicache_io_backend": "direct",
            "hicache_mem_layout": "page_first_direct",
        }


MODELS: dict[str, TraceModel] = {
    "gpt-oss-120b": KeysAndValues(PRESETS["gpt-oss-120b"]),
    "deepseek-v4-flash": CompressedPages(COMPRESSED["deepseek-v4-flash"]),
}
"""By the names that ``launch.bench.trace`` takes."""
