"""SGLang's storage backends behind our port.

Their interface has three generations: ``batch_get`` and ``batch_set`` by values, ``_v1`` by
host indices, ``_v2`` for pools beside the first one. Full-attention pages go through ``_v1``
where a backend has it, windows through ``_v2``.
"""

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.config import BACKEND
from sglang_ext.core.storage.keys import Key
from sglang_ext.core.storage.plan import Objects
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig

logger = logging.getLogger(__name__)


class EnginePageStore:
    """PageStore (see ``storage.port``) over a ``HiCacheStorage``.

    Args:
        pools: host pools by the engine's names, see ``storage_pools``.
    """

    def __init__(
        self, backend: "HiCacheStorage", pools: dict[Any, Any], indices: SlotIndices
    ) -> None:
        from sglang.srt.mem_cache.hicache_storage import (
            HiCacheStorage,
            PoolHitPolicy,
            PoolName,
            PoolTransfer,
        )

        self.backend = backend
        self._pool = pools[PoolName.KV]
        self._page = int(self._pool.page_size)
        self._indices = indices
        self._window = PoolName.SWA
        self._transfer = PoolTransfer
        self._trailing = PoolHitPolicy.TRAILING_PAGES
        inner = type(getattr(backend, "_backend", backend))
        self._by_index = inner.batch_get_v1 is not HiCacheStorage.batch_get_v1
        self._found: Key | None = None  # a page that was there when it was last looked for

    def resume_points(self, keys: Sequence[Key], window: int) -> list[int]:
        """See PageStore."""
        if not keys:
            return []
        # a backend takes the length of the window from the number of keys
        trailing = self._transfer(name=self._window, keys=[""] * window, hit_policy=self._trailing)
        found = self.backend.batch_exists_v2(_names(keys), [trailing])
        if found.kv_hit_pages:
            self._found = keys[found.kv_hit_pages - 1]
        if found.restorable_prefix_pages is None:
            return [found.kv_hit_pages] if found.kv_hit_pages else []
        return sorted(int(stop) for stop in found.restorable_prefix_pages)

    def has(self, key: Key) -> bool:
        """See PageStore."""
        is_there = int(self.backend.batch_exists(_names([key]))) == 1
        if is_there:
            self._found = key
        return is_there

    def load(self, component: int, objects: Objects) -> int:
        """See PageStore."""
        names, indices = _names(objects.keys), self._indices.tokens(objects.slots)
        if component != FULL:
            transfer = self._transfer(name=self._window, host_indices=indices, keys=names)
            results = self.backend.batch_get_v2([transfer])[self._window]
        elif self._by_index:
            results = self.backend.batch_get_v1(names, indices)
        else:
            places = [self._pool.get_dummy_flat_data_page() for _ in names]
            pages = self.backend.batch_get(names, places) or []
            results = [page is not None for page in pages]
            for number, page in enumerate(pages):
                if page is not None:
                    self._pool.set_from_flat_data_page(int(indices[number * self._page]), page)
        return _whole_pages(results, objects)

    def store(self, component: int, objects: Objects) -> int:
        """See PageStore."""
        names, indices = _names(objects.keys), self._indices.tokens(objects.slots)
        if component != FULL:
            transfer = self._transfer(name=self._window, host_indices=indices, keys=names)
            results = self.backend.batch_set_v2([transfer])[self._window]
        elif self._by_index:
            results = self.backend.batch_set_v1(names, indices)
        else:
            starts = indices[:: self._page].tolist()
            pages = [self._pool.get_data_page(start) for start in starts]
            results = [bool(self.backend.batch_set(names, pages))] * len(names)
        return _whole_pages(results, objects)

    def use(self, keys: Sequence[Key], windows: Collection[int]) -> None:
        """See PageStore; only our own backend knows what that is."""
        if (use := getattr(self.backend, "use", None)) is not None:
            use(_names(keys), windows)

    def clear(self) -> None:
        """See PageStore. Mooncake leaves, without a word, what was read or looked for in the last
        seconds.

        Raises:
            RuntimeError: something is still stored.
        """
        self.backend.clear()
        if self._found is not None and self.has(self._found):
            raise RuntimeError(
                "a clear left pages behind: a store keeps for some seconds (Mooncake: 10) what was "
                "read or looked for; clear it again when no request has come for so long"
            )

    def close(self) -> None:
        """See PageStore."""
        if (close := getattr(self.backend, "close", None)) is not None:
            close()


def _names(keys: Sequence[Key]) -> list[str]:
    return [key.hex() for key in keys]


def _whole_pages(results: Sequence[Any] | None, objects: Objects) -> int:
    """Table pages, from the first one on, whose every object is good."""
    per_page = objects.slots.shape[1]
    good = 0
    for result in results or ():
        if not result:
            break
        good += 1
    return int(good // per_page)


def create_backend(
    name: str, config: "HiCacheStorageConfig", pools: dict[Any, Any], identity: bytes
) -> "HiCacheStorage":
    """A backend by the engine's name, with the host pools registered; ``file`` is ours.

    Raises:
        Exception: whatever the backend raises when it cannot start.
    """
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.storage import StorageBackendFactory
    from sglang.srt.runtime_context import get_parallel

    anchor = pools[PoolName.KV]
    if name == "file":
        from sglang_ext.adapter.file_backend import FileBackend

        backend: HiCacheStorage = FileBackend(
            config, identity=identity, writers=get_parallel().num_dp_ranks
        )
    else:
        backend = StorageBackendFactory.create_backend(name, config, anchor)
    backend.register_mem_pool_host(anchor)
    for pool_name, pool in pools.items():
        backend.register_mem_host_pool_v2(pool, pool_name)
    backend.on_host_pools_registered()
    return backend


def storage_config(
    model_name: str | None, extra: dict[str, Any], layout: str, metrics: bool
) -> "HiCacheStorageConfig":
    """What the engine tells a storage backend about this rank.

    Its rank is the one among the ranks that share a page: with DP attention those of one DP rank.
    The same prefix is the same object on all DP ranks.

    Args:
        layout: of the host.

    Raises:
        StartupError: a setting that is not supported.
    """
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.runtime_context import get_parallel

    if extra.get("tp_lcm_size"):
        raise StartupError(
            "--hicache-storage-backend-extra-config tp_lcm_size "
            f"{extra['tp_lcm_size']} is not supported by --radix-cache-backend {BACKEND}; "
            "allowed: no value"
        )
    parallel = get_parallel()
    return HiCacheStorageConfig(
        tp_rank=parallel.attn_tp_rank,
        tp_size=parallel.attn_tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=metrics,
        is_page_first_layout=layout == "page_first",
        model_name=model_name,
        dp_rank=parallel.attn_dp_rank,
        extra_config=extra,
    )


def storage_labels(name: str) -> dict[str, Any]:
    """Labels of the engine's metrics of a storage backend of this rank."""
    from sglang.srt.runtime_context import get_observability, get_parallel

    parallel = get_parallel()
    return {
        "storage_backend": name,
        "tp_rank": parallel.attn_tp_rank,
        "dp_rank": parallel.attn_dp_rank,
        "pp_rank": parallel.pp_rank,
        "pp_size": parallel.pp_size,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        **(get_observability().extra_metric_labels or {}),
    }
