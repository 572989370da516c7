"""The index's counters as Prometheus metrics of the engine's own endpoint."""

from sglang_ext.core.index import CacheIndex


class IndexMetrics:
    """Publishes the counters and the occupancy of every tier.

    Import of prometheus_client must wait until the engine has set
    ``PROMETHEUS_MULTIPROC_DIR``, so it happens on construction.
    """

    def __init__(self, index: CacheIndex, labels: dict[str, str]) -> None:
        from prometheus_client import Counter, Gauge

        self._index = index
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
        self._published: dict[str, int] = {}
        self.publish()

    def publish(self) -> None:
        """Add what has happened since the last call."""
        for event, total in self._index.counters.as_dict().items():
            change = total - self._published.get(event, 0)
            if change > 0 or event not in self._published:
                self._events.labels(**self._labels, event=event).inc(change)
                self._published[event] = total
        table = self._index.table
        for component, where, column in (
            ("full", "device", table.device),
            ("full", "host", table.host),
            ("swa", "device", table.swa_device),
            ("swa", "host", table.swa_host),
        ):
            gauge = self._pages.labels(**self._labels, component=component, tier=where)
            gauge.set(column.n_present)
        tier = self._index.host_tier
        if tier is not None and tier.shared is not None:
            for use, size in tier.shared.arena.usage().items():
                self._memory.labels(**self._labels, use=use).set(size)
