"""Opens a storage backend for one rank: at start, and while the server runs."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_kv import HostKv
from sglang_ext.adapter.identity import identity, settings
from sglang_ext.adapter.served_weights import ServedWeights
from sglang_ext.adapter.storage_backend import (
    EnginePageStore,
    create_backend,
    storage_config,
    storage_labels,
)
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.config import BACKEND
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.core.table.window import stored_pages
from sglang_ext.errors import StartupError
from sglang_ext.storage.background import BackgroundStorage

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
    from sglang.srt.observability.metrics_collector import StorageMetrics

    from sglang_ext.adapter.engine_metrics import StorageBatch
logger = logging.getLogger(__name__)

_SETTINGS = "--hicache-storage-backend-extra-config"


class StorageSetup:
    """What a storage backend needs of this rank.

    Attributes:
        weights: those that the server computes with now.
        opened: the backend that was opened last, for a reader; None before.
        labels: of the engine's metrics of the backend that was opened last.
        take_stats: what its batches did since the last call, as the engine counts.
        take_batches: its batches since the last call.

    Args:
        metrics: whether the engine exports metrics.
    """

    def __init__(
        self,
        index: PrefixCache,
        host: HostKv,
        weights: ServedWeights,
        *,
        metrics: bool,
    ) -> None:
        from sglang.srt.runtime_context import get_context

        self.weights = weights
        self._options = settings(get_context().config_leaf)
        self._index = index
        self._host = host
        self._memory = host.memory
        self._metrics = metrics
        self.opened: str | None = None
        self.labels: dict[str, Any] = {}
        self.take_stats: Callable[[], StorageMetrics | None] = lambda: None
        self.take_batches: Callable[[], list[StorageBatch]] = list

    def open(
        self, name: str, extra_config: str | None, policy: str, own: bytes
    ) -> tuple[StorageTier, "HiCacheStorage"]:
        """Open a backend by the engine's name.

        Args:
            extra_config: JSON, or @ and a file, as the engine takes it.
            policy: how long requests wait, see Patience.
            own: see ``identity``.

        Raises:
            StartupError: a setting is wrong, or the backend did not start.
        """
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
            HybridCacheController,
        )
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().pp_size > 1:
            raise StartupError(
                f"{BACKEND}: there is no storage tier with --pp-size above 1; use --tp-size"
            )
        self._host.refuse_storage(name)
        try:
            parsed = HybridCacheController.parse_storage_backend_extra_config(extra_config)
        except (ValueError, OSError, AttributeError) as error:
            raise StartupError(f"{_SETTINGS} {extra_config!r} is not allowed: {error}") from error
        extra, threshold, base_s, per_1024_tokens_s, pass_prefix_keys = parsed
        if pass_prefix_keys:
            raise StartupError(
                f"{_SETTINGS} hicache_storage_pass_prefix_keys true is not supported by "
                f"--radix-cache-backend {BACKEND}; allowed: false"
            )
        geometry = self._index.geometry
        pools = self._host.for_storage()
        # other backends know a model by its name alone. What the server is called does not count:
        # others call the same weights otherwise, and an update leaves the name as it was
        shared_name = self.weights.architecture
        if name != "file":
            shared_name += f"-{own.hex()[:16]}"
        config = storage_config(shared_name, extra, self._host.layout, self._metrics)
        try:
            backend = create_backend(name, config, pools, own)
            store = self._store(name, backend, pools)
        except StartupError:
            raise  # it names the setting
        except Exception as error:
            raise StartupError(
                f"--hicache-storage-backend {name} did not start: {error!r}"
            ) from error
        shape = self._memory.arena.shape
        tier = StorageTier(
            self._index,
            BackgroundStorage(store, geometry),
            StorageLimits.for_host(
                shape.pages(0),
                -(-threshold // geometry.page_tokens),
                self._index.policy.checkpoint_pages,
                stored_pages(geometry, shape.page_bytes, self._index.policy.dense_pages),
            ),
            Patience(policy, base_s * 1000.0, per_1024_tokens_s * 1000.0),
        )
        from sglang_ext.adapter.file_backend import FileBackend

        where = backend.describe() if isinstance(backend, FileBackend) else name
        self.opened = f"{where}; identity {own.hex()}; prefetch policy {policy}"
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
        self.take_batches = store.take_batches
        return store

    def identity(self) -> bytes:
        """Of the pages that are computed now. A collective after each change of weights."""
        from sglang.srt.runtime_context import get_parallel

        geometry = self._index.geometry
        return identity(
            self.weights.configuration,
            self.weights.digest(),
            {
                "options": self._options,
                "page": geometry.device_page,
                "window": geometry.window,
                "layout": self._host.layout,
                # the ranks that share a page; how many there are in all does not count
                "tp_size": get_parallel().attn_tp_size,
                **self._host.described(),
            },
        )
