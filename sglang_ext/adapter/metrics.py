"""The index's counters as Prometheus metrics of the engine's own endpoint."""

from collections.abc import Callable
from typing import Any

from sglang_ext.adapter.engine_metrics import HostTierFeed, StorageFeed
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.counters import NAMES
from sglang_ext.core.host.arena import Arena

_COLUMNS = (("full", "device"), ("full", "host"), ("swa", "device"), ("swa", "host"))
"""Component and tier of each column of slots."""


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
        pages = Gauge(
            "sglang_ext:cache_pages",
            "Pages present, by component and tier.",
            [*names, "component", "tier"],
            multiprocess_mode="mostrecent",
        )
        memory = Gauge(
            "sglang_ext:host_memory_bytes",
            "Host memory by use: pages of full attention, pages of windows, holes, free.",
            [*names, "use"],
            multiprocess_mode="mostrecent",
        )
        sampling = Gauge(
            "sglang_ext:host_sampling",
            "1 while nothing on the host is read and only a sample of the prefixes is copied.",
            names,
            multiprocess_mode="mostrecent",
        )
        learned = Gauge(
            "sglang_ext:retention_learned",
            "1 while what is expected back decides who stays, 0 while recency does.",
            names,
            multiprocess_mode="mostrecent",
        )
        price = Gauge(
            "sglang_ext:retention_price",
            "What pages were worth that had to go: uses in 1,000 requests.",
            names,
            multiprocess_mode="mostrecent",
        )
        recompute = Gauge(
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
        self._counted: tuple[int, ...] = ()
        self._files_counted: dict[str, int] = {}
        # in the order of ``_state``; to look one up by its labels takes longer than to set it
        self._gauges = [
            *[gauge.labels(**labels) for gauge in (recompute, sampling, learned, price)],
            *[pages.labels(**labels, component=c, tier=t) for c, t in _COLUMNS],
            *[memory.labels(**labels, use=use) for use in (arena.usage() if arena else ())],
        ]
        self._shown: tuple[float | None, ...] = (None,) * len(self._gauges)
        self.publish()

    def publish(self) -> None:
        """Add what has happened since the last call. Most steps of a decode change nothing, and
        cost some comparisons."""
        feeds = [feed for feed in (self.host, self.storage) if feed is not None]
        counted = self._index.counters.numbers()
        if counted != self._counted:
            self._counted = counted
            for event, change in self._changes("", dict(zip(NAMES, counted, strict=True))):
                self._events.labels(**self._labels, event=event).inc(change)
                for feed in feeds:
                    feed.count(event, change)
        for feed in feeds:
            feed.observe()
        files = self.files()
        if files != self._files_counted:
            self._files_counted = files
            for event, change in self._changes("file ", files):
                self._files.labels(**self._labels, event=event).inc(change)
        state = self._state()
        if state != self._shown:
            for gauge, value, before in zip(self._gauges, state, self._shown, strict=True):
                if value != before:
                    gauge.set(value)
            self._shown = state

    def _changes(self, kind: str, totals: dict[str, int]) -> list[tuple[str, int]]:
        """Events that were never told of, or happened since, and how often."""
        changes = []
        for event, total in totals.items():
            change = total - self._published.get(kind + event, 0)
            if change > 0 or kind + event not in self._published:
                self._published[kind + event] = total
                changes.append((event, change))
        return changes

    def _state(self) -> tuple[float, ...]:
        """What the gauges show."""
        index, table = self._index, self._index.table
        return (
            self._largest,
            index.sampling.is_on,
            index.expiry.is_learned,
            index.expiry.uses_per_1000,
            table.device.n_present,
            table.host.n_present,
            table.swa_device.n_present,
            table.swa_host.n_present,
            *(self._arena.usage().values() if self._arena is not None else ()),
        )

    def matched(self, tokens_behind: int) -> None:
        """A request found its prefix; so many tokens of it have no window to resume from."""
        self._largest = max(self._largest, tokens_behind)
