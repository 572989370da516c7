"""Opens a storage backend for one rank: at start, and while the server runs."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_pools import layers_by_component, page_bytes
from sglang_ext.adapter.identity import identity
from sglang_ext.adapter.storage_backend import (
    EnginePageStore,
    create_backend,
    storage_config,
    storage_labels,
)
from sglang_ext.adapter.storage_pools import pools_for_storage
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.config import BACKEND
from sglang_ext.core.index import CacheIndex
from sglang_ext.core.storage_plan import StorageLimits
from sglang_ext.errors import StartupError
from sglang_ext.storage.background import BackgroundStorage

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.observability.metrics_collector import StorageMetrics

    from sglang_ext.adapter.host_arena import ArenaMemory

logger = logging.getLogger(__name__)

_SETTINGS = "--hicache-storage-backend-extra-config"


class StorageSetup:
    """What a storage backend needs of this rank.

    Args:
        metrics: whether the engine exports metrics.

    Attributes:
        opened: the backend that was opened last, for a reader; None before.
        labels: of the engine's metrics of the backend that was opened last.
        take_stats: what its batches did since the last call.
    """

    def __init__(
        self,
        index: CacheIndex,
        kv_pool: "SWAKVPool",
        group: "HostPoolGroup",
        memory: "ArenaMemory",
        *,
        metrics: bool,
    ) -> None:
        self._index = index
        self._kv_pool = kv_pool
        self._group = group
        self._memory = memory
        self._metrics = metrics
        self.opened: str | None = None
        self.labels: dict[str, Any] = {}
        self.take_stats: Callable[[], StorageMetrics | None] = lambda: None

    def open(
        self, name: str, settings: str | None, policy: str, model_name: str | None
    ) -> tuple[StorageTier, "HiCacheStorage"]:
        """Open a backend by the engine's name.

        Args:
            settings: JSON, or @ and a file, as the engine takes it.
            policy: how long requests wait, see Patience.
            model_name: as the server calls its model.

        Raises:
            StartupError: a setting is wrong, or the backend did not start.
        """
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
            HybridCacheController,
        )

        if len(self._group.entries) == 1:
            raise StartupError(
                f"{BACKEND}: a storage tier for models without full-attention layers is not "
                "supported"
            )
        try:
            parsed = HybridCacheController.parse_storage_backend_extra_config(settings)
        except (ValueError, OSError, AttributeError) as error:
            raise StartupError(f"{_SETTINGS} {settings!r} is not allowed: {error}") from error
        extra, threshold, base_s, per_1024_tokens_s, pass_prefix_keys = parsed
        if pass_prefix_keys:
            raise StartupError(
                f"{_SETTINGS} hicache_storage_pass_prefix_keys true is not supported by "
                f"--radix-cache-backend {BACKEND}; allowed: false"
            )
        geometry, own = self._index.geometry, self._identity()
        pools = pools_for_storage(self._group, self._memory)
        anchor = self._group.entries[0].host_pool
        # other backends know a model by its name alone
        shared_name = model_name if name == "file" else f"{model_name}-{own.hex()[:12]}"
        config = storage_config(shared_name, extra, anchor, self._metrics)
        try:
            backend = create_backend(name, config, pools, own)
        except Exception as error:
            raise StartupError(
                f"--hicache-storage-backend {name} did not start: {error!r}"
            ) from error
        store = self._store(name, backend, pools)
        tier = StorageTier(
            self._index,
            BackgroundStorage(store, geometry),
            StorageLimits.for_host(
                self._memory.arena.shape.pages(0),
                -(-threshold // geometry.page_tokens),
                self._index.policy.checkpoint_pages,
            ),
            Patience(policy, base_s * 1000.0, per_1024_tokens_s * 1000.0),
        )
        self.opened = f"{name}, prefetch policy {policy}, pages of {own.hex()}"
        logger.info("sglang-ext: storage %s", self.opened)
        return tier, backend

    def _store(
        self, name: str, backend: "HiCacheStorage", pools: dict[Any, Any]
    ) -> EnginePageStore:
        """The backend behind our port; it is measured if anybody looks."""
        indices = SlotIndices(self._index.geometry)
        if not self._metrics:
            return EnginePageStore(backend, pools, indices)
        from sglang_ext.adapter.engine_metrics import MeteredStore

        page_bytes = [sum(size) for size in self._memory.arena.shape.page_bytes]
        store = MeteredStore(backend, pools, indices, page_bytes)
        self.labels, self.take_stats = storage_labels(name), store.take_stats
        return store

    def _identity(self) -> bytes:
        from sglang.srt.runtime_context import get_model, get_parallel

        model, pool, geometry = get_model(), self._kv_pool, self._index.geometry
        said = ("revision", "dtype", "quantization", "load_format", "json_model_override_args")
        components = (pool.full_kv_pool, pool.swa_kv_pool)
        return identity(
            model.model_path,
            {
                "said": {name: str(getattr(model, name, None)) for name in said},
                "kv": [str(component.dtype) for component in components],
                "page_bytes": [page_bytes(component, geometry) for component in components],
                "layers": [sorted(layers) for layers in layers_by_component(pool)],
                "page": geometry.device_page,
                "window": geometry.window,
                "layout": self._group.entries[0].host_pool.layout,
                "tp_size": get_parallel().tp_size,
            },
        )
