"""DeepSeek-V4: what of its pools a page is.

Layers of a model keep compressed KV of all tokens, in one of two ratios, with an index beside the
denser one, and KV of a window. A window is of no use without the states of the compressors, which
have read a part of what they write next. So full attention is C4, its index with its scales, and
C128; the window is its KV, and the states of C4 and of its index. C128 has no state at the end of a
page, which is a multiple of 128 tokens.

V4.1 has ratios 1 and 2, each with an index, kept by the first of the layers that read it. They have
no state at the end of a page. With ``--enable-encoder-swa-bounded-replay`` a request has its window
for itself, and the engine computes it again wherever the request resumes: then a page is compressed
KV, and a request resumes at every one (``full_alone``).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter.byte_pages import ByteHost, ByteLayers, in_order, rows_by_page, sizes_of
from sglang_ext.adapter.drafts import DraftLayers, settings_of_drafts
from sglang_ext.adapter.full_alone import NO_WINDOWS
from sglang_ext.adapter.host_kv import build_memory
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.config import BACKEND
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

_SERVED_RATIOS = {0, 1, 2, 4, 128}
"""Of compression; 0 is a layer with a window alone."""


def is_pool(pool: Any) -> bool:
    """Whether a pool of the engine is this model's, in whatever form."""
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    return isinstance(pool, DeepSeekV4TokenToKVPool)


_DRAFTS = "drafts"
_ALLOWED = (
    "pages of compressed KV, with windows in pages (DeepSeekV4TokenToKVPool) or computed again "
    "(V4.1 with --enable-encoder-swa-bounded-replay)"
)


def refuse_other_forms(pool: Any, params: "CacheInitParams") -> None:
    """Check the form of a pool.

    Raises:
        StartupError: it is not one with pages; the message names it.
    """
    for form, is_it in _other_forms(pool, params):
        if is_it:
            raise StartupError(
                f"{BACKEND}: DeepSeek-V4 {form} is not supported; allowed: {_ALLOWED}; or use "
                f"{OWN_CACHE}"
            )


def _other_forms(pool: Any, params: "CacheInitParams") -> Iterator[tuple[str, bool]]:
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import (
        DeepSeekV4TokenToKVPool,
        HiSparseC4DevicePool,
    )

    yield f"with pools of type {type(pool).__name__}", type(pool) is not DeepSeekV4TokenToKVPool
    page, replays = params.page_size, pool.request_window is not None
    yield (
        "with windows that are computed again beside drafts with windows in pages",
        replays and pool.needs_paged_swa_allocator,
    )
    yield (
        "with the window of each request in a ring (unified_kv)",
        pool.unified_kv_pool is not None or (pool.swa_kv_pool is None and not replays),
    )
    # the engine matches a window less than there is, and computes it again
    yield (
        "with windows in pages of which a prefill writes its end alone, "
        "--enable-decoder-swa-bounded-replay, which V4.1 has by default (unset it with "
        "--no-enable-decoder-swa-bounded-replay, or add --enable-encoder-swa-bounded-replay)",
        params.decoder_swa_bounded_replay and not replays,
    )
    others = sorted(set(pool.compression_ratios) - _SERVED_RATIOS)
    yield f"with layers of compression ratio {', '.join(map(str, others))}", bool(others)
    yield "without layers of compressed KV", not pool.sources_by_ratio
    yield "with --enable-hisparse", isinstance(pool.c4_kv_pool, HiSparseC4DevicePool)
    widest = max(pool.compression_ratios)
    yield f"with --page-size {page}, no multiple of {widest}", page % max(1, widest) != 0


class DeepSeekV4Kv:
    """ModelKv (see ``model_kv``) in ``DeepSeekV4TokenToKVPool``.

    Args:
        target: of the model's own layers; see ``refuse_other_forms``.

    Raises:
        StartupError: drafts have pools of another kind.
    """

    drafts: Sequence[DraftLayers] = ()
    """None is copied in part: a page of the table is one of the allocator."""

    def __init__(
        self, params: "CacheInitParams", target: "DeepSeekV4TokenToKVPool", geometry: Geometry
    ) -> None:
        self._params = params
        self._target = target
        self._geometry = geometry
        self._layers = in_order([*_of_model(target), *_of_drafts(params, target)])

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """See ModelKv."""
        return sizes_of(self._layers)

    def build_host(self) -> ByteHost:
        """See ModelKv."""
        sizes = [(size,) for size in self.page_bytes]
        device = torch.device(self._target.device)
        memory = build_memory(self._params, sizes, self._geometry, device)
        return ByteHost(
            memory, self._layers, _stage_layers(self._target), self._geometry, self._described()
        )

    def _described(self) -> dict[str, Any]:
        pool = self._target
        kv = [f"{type(pool.swa_kv_pool).__name__} {pool.pd_kv_layout()}"]
        states = (*pool.compress_state_pools, *pool.indexer_compress_state_pools)
        kv += sorted({str(state.kv_score_buffer.kv_score.dtype) for state in states if state})
        found: dict[str, Any] = {"kv": kv}
        if self._geometry.overlap:
            found["overlap"] = self._geometry.overlap
        if any(layers.name == _DRAFTS for layers in self._layers):
            found["drafts"] = settings_of_drafts()
        return found


def _stage_layers(pool: "DeepSeekV4TokenToKVPool") -> int:
    windows = pool.swa_kv_pool or pool.request_window.state
    return len(windows.kv_buffer)


def _of_model(pool: "DeepSeekV4TokenToKVPool") -> Iterator[ByteLayers]:
    """What a page has of the model's own layers, those of each component."""
    for ratio, layers in pool.sources_by_ratio.items():
        before = tuple(layer - pool.start_layer for layer in layers)
        planes = _planes([pool.kv_pools[ratio].kv_buffer])
        if (index := pool.index_pools.get(ratio)) is not None:
            rows = index.contiguous_page_row_buffers()
            of_index = [rows[at : at + len(layers)] for at in range(0, len(rows), len(layers))]
            # it may have shorter pages
            planes += _planes(of_index, pool.page_size // ratio // index.page_size)
        yield ByteLayers(FULL, f"C{ratio}", before, planes)
    if pool.request_window is not None:
        yield NO_WINDOWS
        return
    everywhere = tuple(range(_stage_layers(pool)))
    yield ByteLayers(WINDOW, "SWA", everywhere, _planes([pool.swa_kv_pool.kv_buffer], _rows(pool)))
    by_kind = (pool.compress_state_pools, pool.indexer_compress_state_pools)
    # states that follow the pages of windows; others are of a request, and nothing is left of
    # them at the end of a page
    paged = [
        [(layer, state) for layer, state in enumerate(states) if state and not state.request_scoped]
        for states in by_kind
    ]
    if paged[0]:
        before = tuple(layer - pool.start_layer for layer, _ in paged[0])
        rings = {state.ring_size for states in paged for _, state in states}
        assert len(rings) == 1, "a page has as many states of each kind"
        states = [[state.kv_score_buffer.kv_score for _, state in kind] for kind in paged]
        yield ByteLayers(WINDOW, "states", before, _planes(states, rings.pop()))


def _of_drafts(
    params: "CacheInitParams", target: "DeepSeekV4TokenToKVPool"
) -> Iterator[ByteLayers]:
    """Drafts are layers with windows alone, with the slots of the model's. They run behind it: the
    first of them come with its first layer, and all before its last."""
    last = _stage_layers(target) - 1
    for pool in (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools):
        if is_pool(pool) and target.request_window is not None:
            continue  # a ring of each request, which the engine begins anew where it resumes
        known = is_pool(pool) and pool.swa_size == target.swa_size and not pool.sources_by_ratio
        if not (known and pool.request_window is None and pool.unified_kv_pool is None):
            raise StartupError(
                f"{BACKEND}: drafts with a KV pool of type {type(pool).__name__} of this form are "
                "not supported with DeepSeek-V4; allowed: its own MTP layers "
                "(--speculative-algorithm EAGLE) and its DSPARK drafts, with paged windows"
            )
        buffers = pool.swa_kv_pool.kv_buffer
        before = tuple(min(depth, last) for depth in range(len(buffers)))
        yield ByteLayers(WINDOW, _DRAFTS, before, _planes([buffers], _rows(pool)))


def _rows(pool: "DeepSeekV4TokenToKVPool") -> int:
    """Of the window's buffers, that a page has: kernels may want shorter pages than the
    allocator's."""
    return int(pool.swa_page_size // pool.swa_kv_pool.page_size)


def _planes(
    planes: Sequence[Sequence[torch.Tensor]], rows: int = 1
) -> tuple[tuple[torch.Tensor, ...], ...]:
    return tuple(tuple(rows_by_page(layer, rows) for layer in plane) for plane in planes)
