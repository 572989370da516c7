"""The engine's own metrics are fed from our cache: each one that stock's cache feeds."""

import inspect
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
from sglang.srt.mem_cache import base_prefix_cache, unified_radix_cache
from sglang.srt.observability.metrics_collector import (
    RadixCacheMetricsCollector,
    StorageMetricsCollector,
)

from sglang_ext.adapter import engine_metrics, prefix_cache
from sglang_ext.adapter.engine_metrics import HostTierFeed, MeteredStore, StorageFeed
from sglang_ext.adapter.storage_backend import EnginePageStore
from sglang_ext.core.counters import Counters, Unfulfilled
from sglang_ext.core.host.arena import Arena, shape_for
from sglang_ext.core.storage.plan import Objects
from sglang_ext.core.write_policy import WritePolicy
from tests.fixtures.registry import own_registry

PAGE = 16
PAGE_BYTES = ((100, 60), (50, 30))
LABELS = {"tp_rank": "0"}
NOT_FED = {
    # stock tries again later what found no room; ours computes
    "log_storage_prefetch_deferred_tokens",
    # both kinds of pages take one memory: it is "host_capacity"
    "log_prefetch_aux_alloc_failed_tokens",
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> prometheus_client.CollectorRegistry:
    return own_registry(monkeypatch)


def value(registry: Any, name: str, **labels: str) -> float | None:
    found: float | None = registry.get_sample_value(f"sglang:{name}", {**LABELS, **labels})
    return found


def host_feed(
    policy: WritePolicy = WritePolicy.WRITE_THROUGH,
    page_bytes: tuple[tuple[int, int], ...] = PAGE_BYTES,
) -> HostTierFeed:
    arena = Arena(shape_for(100_000, page_bytes, 1))
    return HostTierFeed(RadixCacheMetricsCollector(LABELS), arena, PAGE, policy)


def tell(feed: HostTierFeed | StorageFeed, event: str, pages: int) -> None:
    """The feed tells so many more pages."""
    for update in feed.updates(event, pages):
        update()


def calls(source: object, collector: str) -> set[str]:
    """Methods of a collector that some code calls."""
    return set(re.findall(rf"\b{collector}\.(\w+)\(", inspect.getsource(source)))  # type: ignore[arg-type]


def test_every_method_that_the_engines_cache_calls_is_called_by_ours() -> None:
    ours = inspect.getsource(engine_metrics) + inspect.getsource(prefix_cache)
    stock = calls(unified_radix_cache, "metrics_collector")
    stock |= calls(unified_radix_cache, "storage_metrics_collector")
    stock |= calls(base_prefix_cache, "metrics_collector") & dir_of(RadixCacheMetricsCollector)
    assert {"observe_eviction_duration", "observe_backup_duration"} < stock
    assert {"log_storage_metrics", "log_backuped_tokens"} < stock
    by_name = {
        f"increment_{direction}_num_{what}"
        for direction in ("backup", "load_back")
        for what in ("tokens", "bytes")
    }
    # the base class of both does this one's two
    assert "self.update_eviction_metrics(" in ours
    eviction = {"observe_eviction_duration", "increment_eviction_num_tokens"}
    missing = {name for name in stock if not re.search(rf"\.{name}\b", ours)}
    assert missing - by_name - eviction == NOT_FED


def dir_of(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_copies_durations_and_losses_of_the_host_tier(registry: Any) -> None:
    feed = host_feed()
    dropped = {"reason": "write_through_unbacked_eviction", "pool": "kv"}
    assert value(registry, "hicache_dropped_tokens_total", **dropped) == 0, "there from the start"
    for event, pages in (
        ("backed_up_pages", 3),
        ("backed_up_window_pages", 2),
        ("loaded_pages", 5),
        ("unsaved_pages", 7),
        ("demoted_pages", 100),
    ):
        tell(feed, event, pages)
    assert value(registry, "hicache_backup_tokens_total", pool="kv") == 3 * PAGE
    assert value(registry, "hicache_backup_tokens_total", pool="swa") == 2 * PAGE
    assert value(registry, "hicache_backup_bytes_total") == 3 * 160 + 2 * 80
    assert value(registry, "load_back_tokens_total", pool="kv") == 5 * PAGE
    assert value(registry, "load_back_bytes_total") == 5 * 160
    assert value(registry, "hicache_dropped_tokens_total", **dropped) == 7 * PAGE
    for seconds in (0.5, 0.25, 1.0):
        feed.observe("backup", seconds)
    feed.observe("load", 0.125)
    assert value(registry, "hicache_backup_duration_seconds_sum") == 1.75
    assert value(registry, "hicache_backup_duration_seconds_count") == 3
    assert value(registry, "load_back_duration_seconds_sum") == 0.125
    assert value(registry, "load_back_duration_seconds_count") == 1


def test_other_write_policies_drop_under_pressure(registry: Any) -> None:
    feed = host_feed(WritePolicy.WRITE_BACK)
    tell(feed, "unsaved_pages", 1)
    labels = {"reason": "host_pressure", "pool": "kv"}
    assert value(registry, "hicache_dropped_tokens_total", **labels) == PAGE


def test_numbers_of_a_model_with_windows_alone_are_no_tokens(registry: Any) -> None:
    feed = host_feed(page_bytes=((40, 40),))
    for event in ("backed_up_pages", "unsaved_pages", "backed_up_window_pages"):
        tell(feed, event, 2)
    assert value(registry, "hicache_backup_tokens_total", pool="kv") is None
    assert value(registry, "hicache_backup_tokens_total", pool="swa") == 2 * PAGE
    assert value(registry, "hicache_backup_bytes_total") == 2 * 80


def test_storage_totals_and_reasons(registry: Any) -> None:
    feed = StorageFeed(PAGE, StorageMetricsCollector)
    tell(feed, "persisted_pages", 9)  # there is no storage yet
    feed.observe()
    from sglang.srt.observability.metrics_collector import StorageMetrics

    stats = [StorageMetrics([3, 4], [5], [1.5, 2.5], [0.5]), None]
    feed.attach(LABELS, lambda: stats.pop(0))
    for event in ("persisted_pages", "prefetched_pages", "found_pages", "loaded_pages"):
        tell(feed, event, {"persisted_pages": 2, "prefetched_pages": 3}.get(event, 8))
    assert value(registry, "backuped_tokens_total") == 2 * PAGE
    assert value(registry, "prefetched_tokens_total") == 3 * PAGE
    assert value(registry, "storage_prefetch_hit_tokens_total") == 8 * PAGE
    for event in Counters().as_dict():
        if event.startswith("unfulfilled_"):
            tell(feed, event, 1)
    for reason, times in Counter(engine_metrics._REASONS.values()).items():
        name = "storage_prefetch_unfulfilled_tokens_total"
        assert value(registry, name, reason=reason) == times * PAGE
    assert set(engine_metrics._REASONS) == set(Unfulfilled)
    feed.observe()
    feed.observe()
    for name, count, total in (
        ("prefetch_pgs", 2, 7),
        ("backup_pgs", 1, 5),
        ("prefetch_bandwidth", 2, 4.0),
        ("backup_bandwidth", 1, 0.5),
    ):
        assert value(registry, f"{name}_count") == count
        assert value(registry, f"{name}_sum") == total
    feed.detach()
    feed.observe()
    feed.attach(LABELS, lambda: None)  # a second collector would be refused
    feed.observe()


def test_batches_of_storage_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 14.0, 20.0, 20.0, 30.0, 31.0, 40.0, 50.0])
    monkeypatch.setattr(engine_metrics.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(EnginePageStore, "__init__", lambda self, backend, *_: setup(self, backend))
    monkeypatch.setattr(EnginePageStore, "load", lambda *_: 3)
    monkeypatch.setattr(EnginePageStore, "store", lambda _, __, objects: len(objects))
    monkeypatch.setattr(EnginePageStore, "resume_points", lambda _, keys, __: [len(keys) // 2])

    def setup(store: EnginePageStore, backend: Any) -> None:
        store.backend = backend

    def fail(*_: object) -> int:
        raise OSError("the disk")

    backend = SimpleNamespace(get_stats=lambda: None)
    store = MeteredStore(backend, {}, None, [4 * 10**9, 10**9])  # type: ignore[arg-type]
    five, some, none = (Objects([], np.zeros((n, 1), dtype=np.int32)) for n in (5, 2, 0))
    assert store.load(0, five) == 3
    assert store.store(1, some) == 2
    assert store.store(0, none) == 0
    assert store.resume_points([b"a", b"b"], 1) == [1]
    monkeypatch.setattr(EnginePageStore, "load", fail)
    with pytest.raises(OSError, match="the disk"):
        store.load(0, some)
    assert store.take_batches() == [
        ("read", "part", 12 * 10**9, 2.0),
        ("write", "all", 2 * 10**9, 4.0),
        ("write", "all", 0, 1e-9),
        ("lookup", "part", 0, 1.0),
        ("read", "error", 0, 0.0),
    ]
    assert store.take_batches() == []
    stats = store.take_stats()
    assert (stats.prefetch_pgs, stats.prefetch_bandwidth) == ([3], [6.0])
    assert (stats.backup_pgs, stats.backup_bandwidth) == ([2], [0.5]), "nothing is no batch"
    assert store.take_stats().prefetch_pgs == []
    own = SimpleNamespace(prefetch_pgs=[1])
    backend.get_stats = lambda: own
    assert store.take_stats() is own, "a backend that measures itself knows better"
