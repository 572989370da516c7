"""Latent attention (MLA) in full-attention and sliding-window layers: what of its pools a page is.

A token has one row in each layer, K and V in one, and not by head. So each component has one plane.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter.byte_pages import ByteHost, ByteLayers, rows_by_page, sizes_of
from sglang_ext.adapter.host_kv import build_memory
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.stacks import layers_by_component
from sglang_ext.config import BACKEND
from sglang_ext.core.table.geometry import MIN_PAGE_TOKENS, Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def is_pool(pool: Any) -> bool:
    """Whether a pool of the engine is of latent attention with windows, in whatever form."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    return type(pool) is SWAKVPool and all(
        isinstance(component, MLATokenToKVPool)
        for component in (pool.full_kv_pool, pool.swa_kv_pool)
    )


def refuse_other_forms(pool: "SWAKVPool", page: int) -> None:
    """Check the form of a pool.

    Args:
        page: tokens.

    Raises:
        StartupError: it is not the plain one; the message names what it has.
    """
    for form, allowed in _other_forms(pool, page):
        raise StartupError(
            f"{BACKEND}: latent attention (MLA) with windows, {form}, is not supported; allowed: "
            f"{allowed}; or use {OWN_CACHE}"
        )


def _other_forms(pool: "SWAKVPool", page: int) -> Iterator[tuple[str, str]]:
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool

    components = (pool.full_kv_pool, pool.swa_kv_pool)
    plain = "pools of type MLATokenToKVPool"
    for component in components:
        if isinstance(component, DSATokenToKVPool):
            # the engine waits for a layer when it reads KV, and reads the index before that
            yield "with an index (DSA)", plain
        elif type(component) is not MLATokenToKVPool:
            yield f"in pools of type {type(component).__name__}", plain
    if page < MIN_PAGE_TOKENS:
        yield f"--page-size {page}", f"--page-size {MIN_PAGE_TOKENS} or more"


class LatentKv:
    """ModelKv (see ``model_kv``) in ``SWAKVPool`` with latent rows.

    Args:
        target: of the model's own layers; see ``refuse_other_forms``.

    Raises:
        StartupError: there are drafts with KV of their own.
    """

    drafts = ()
    """None is copied in part: a page of the table is one of the allocator."""

    def __init__(self, params: "CacheInitParams", target: "SWAKVPool", geometry: Geometry) -> None:
        if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
            raise StartupError(
                f"{BACKEND}: drafts with KV of their own are not supported with latent attention; "
                "use --speculative-algorithm NGRAM"
            )
        self._params = params
        self._target = target
        self._geometry = geometry
        page = geometry.device_page
        self._layers = [
            ByteLayers(component, name, tuple(layers), (_rows(pool, page),))
            for component, name, layers, pool in zip(
                (FULL, WINDOW),
                ("latent", "latent of windows"),
                layers_by_component(target),
                (target.full_kv_pool, target.swa_kv_pool),
                strict=True,
            )
        ]

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """See ModelKv."""
        return sizes_of(self._layers)

    def build_host(self) -> ByteHost:
        """See ModelKv."""
        pool = self._target
        sizes = [(size,) for size in self.page_bytes]
        memory = build_memory(self._params, sizes, self._geometry, torch.device(pool.device))
        described = {"kv": [str(part.dtype) for part in (pool.full_kv_pool, pool.swa_kv_pool)]}
        layers = 1 + max(pool.layers_mapping)
        return ByteHost(memory, self._layers, layers, self._geometry, described)


def _rows(pool: Any, page: int) -> tuple[torch.Tensor, ...]:
    return tuple(rows_by_page(layer, page) for layer in pool.kv_buffer)
