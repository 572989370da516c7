"""The index's counters as Prometheus metrics of the engine's own endpoint."""

from collections.abc import Callable
from typing import Any

from sglang_ext.adapter.engine_metrics import HostTierFeed, StorageFeed
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.host.arena import Arena


class IndexMetrics:
    """Publishes the counters and the occupancy of every tier, and feeds the engine's own
    metrics.

    Args:
        arena: the host memory, None without one.

    Attributes:
        files: what has happened to files of pages, if storage is a directory.
        host: feeds the engine's metrics of its host tier, None without one.
        storage: feeds the engine's metrics of a storage tier, None without a host tier.

    Import of prometheus_client must wait until the engine has set
    ``PROMETHEUS_MULTIPROC_DIR``, so it happens on construction.
    """

    def __init__(self, index: PrefixCache, labels: dict[str, Any], arena: Arena | None) -> None:
        from prometheus_client import Counter, Gauge

        self._index = index
        self._arena = arena
        self._labels = labels
        names = list(labels)
        self._events = Counter(
            "sglang_ext:cache_events_total",
            "Pages moved, dropped or evicted, transfers failed and declined, by event.",
            [*names, "event"],
        )
        self._pages = Gauge(
            "sglang_ext:cache_pages",
            "Pages present, by component and tier.",
            [*names, "component", "tier"],
            multiprocess_mode="mostrecent",
        )
        self._memory = Gauge(
            "sglang_ext:host_memory_bytes",
            "Host memory by use: pages of full attention, pages of windows, holes, free.",
            [*names, "use"],
            multiprocess_mode="mostrecent",
        )
        self._sampling = Gauge(
            "sglang_ext:host_sampling",
            "1 while nothing on the host is read and only a sample of the prefixes is copied.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._learned = Gauge(
            "sglang_ext:retention_learned",
            "1 while what is expected back decides who stays, 0 while recency does.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._price = Gauge(
            "sglang_ext:retention_price",
            "What pages were worth that had to go: uses in 1,000 requests.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._recompute = Gauge(
            "sglang_ext:largest_recompute_tokens",
            "Most cached tokens of a prompt that had to be computed again for want of a window.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._files = Counter(
            "sglang_ext:storage_files_total",
            "Files of pages that were missing, damaged, foreign, not written or removed.",
            [*names, "event"],
        )
        self.files: Callable[[], dict[str, int]] = dict
        self.host: HostTierFeed | None = None
        self.storage: StorageFeed | None = None
        self._largest = 0
        self._published: dict[str, int] = {}
        self.publish()

    def publish(self) -> None:
        """Add what has happened since the last call."""
        feeds = [feed for feed in (self.host, self.storage) if feed is not None]
        for event, total in self._index.counters.as_dict().items():
            change = total - self._published.get(event, 0)
            if change > 0 or event not in self._published:
                self._events.labels(**self._labels, event=event).inc(change)
                self._published[event] = total
                for feed in feeds:
                    feed.count(event, change)
        for feed in feeds:
            feed.observe()
        for event, total in self.files().items():
            change = total - self._published.get(f"file {event}", 0)
            if change > 0:
                self._files.labels(**self._labels, event=event).inc(change)
                self._published[f"file {event}"] = total
        self._recompute.labels(**self._labels).set(self._largest)
        self._sampling.labels(**self._labels).set(self._index.sampling.is_on)
        self._learned.labels(**self._labels).set(self._index.expiry.is_learned)
        self._price.labels(**self._labels).set(self._index.expiry.uses_per_1000)
        table = self._index.table
        for component, where, column in (
            ("full", "device", table.device),
            ("full", "host", table.host),
            ("swa", "device", table.swa_device),
            ("swa", "host", table.swa_host),
        ):
            gauge = self._pages.labels(**self._labels, component=component, tier=where)
            gauge.set(column.n_present)
        if self._arena is not None:
            for use, size in self._arena.usage().items():
                self._memory.labels(**self._labels, use=use).set(size)

    def matched(self, tokens_behind: int) -> None:
        """A request found its prefix; so many tokens of it have no window to resume from."""
        self._largest = max(self._largest, tokens_behind)
