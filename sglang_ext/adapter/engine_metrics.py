"""What the engine's own collectors are fed with, so that its dashboards show our cache too."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.publishing import Update
from sglang_ext.adapter.storage_backend import EnginePageStore
from sglang_ext.core.counters import Unfulfilled
from sglang_ext.core.host.arena import Arena
from sglang_ext.core.storage.keys import Key
from sglang_ext.core.storage.plan import Objects
from sglang_ext.core.write_policy import WritePolicy

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
    from sglang.srt.observability.metrics_collector import (
        RadixCacheMetricsCollector,
        StorageMetrics,
        StorageMetricsCollector,
    )

_REASONS = {
    Unfulfilled.STALE: "anchor_lost",
    Unfulfilled.BACKLOG: "dropped",
    Unfulfilled.HOST_FULL: "host_capacity",
    Unfulfilled.QUOTA: "host_capacity",  # of a namespace; the engine has no name for it
    Unfulfilled.LATE: "deadline",
    Unfulfilled.UNREAD: "storage_transfer",
}
"""Why pages of storage were not used, as the engine names it."""
_BATCHES = 256
"""Batches of storage that are kept for the next look."""
_Count = Callable[[int], None]
"""Tells a collector of the engine that there are so many more pages."""


def _times(each: int, tell: Callable[..., None], pages: int, **labels: str) -> None:
    tell(pages * each, **labels)


class HostTierFeed:
    """Feeds the collector of the prefix cache; evictions are told by the cache itself.

    Args:
        arena: the host memory.
    """

    def __init__(
        self,
        collector: "RadixCacheMetricsCollector",
        arena: Arena,
        page_tokens: int,
        write_policy: WritePolicy,
    ) -> None:
        self._collector = collector
        page_bytes = arena.shape.page_bytes
        dropped = "host_pressure"
        if write_policy is WritePolicy.WRITE_THROUGH:
            dropped = "write_through_unbacked_eviction"
        # there from the start, as ours are
        collector.increment_eviction_num_tokens(0)
        for reason in {"host_pressure", dropped}:
            collector.increment_dropped_tokens(0, reason, "kv")
        self._counts: dict[str, tuple[_Count, ...]] = {}
        for direction, ours in (("backup", "backed_up"), ("load_back", "loaded")):
            tokens = getattr(collector, f"increment_{direction}_num_tokens")
            size = getattr(collector, f"increment_{direction}_num_bytes")
            self._counts[f"{ours}_window_pages"] = (
                partial(_times, page_tokens, tokens, pool="swa"),
                partial(_times, sum(page_bytes[-1]), size),
            )
            # pages of a model without full-attention layers are nothing but numbers
            if len(page_bytes) == 2:
                self._counts[f"{ours}_pages"] = (
                    partial(_times, page_tokens, tokens, pool="kv"),
                    partial(_times, sum(page_bytes[0]), size),
                )
        if len(page_bytes) == 2:
            tokens = collector.increment_dropped_tokens
            lost = partial(_times, page_tokens, tokens, reason=dropped, pool="kv")
            self._counts["unsaved_pages"] = (lost,)

    def updates(self, event: str, pages: int) -> Sequence[Update]:
        """What says that there are so many more pages of an event of ours."""
        return [partial(count, pages) for count in self._counts.get(event, ())]

    def observe(self, direction: str, seconds: float) -> None:
        """A job of copies has ended, a ``backup`` or a ``load``."""
        if direction == "backup":
            self._collector.observe_backup_duration(seconds)
        else:
            self._collector.observe_load_back_duration(seconds)


class StorageFeed:
    """Feeds the collector of a storage tier, while there is one.

    Args:
        make: makes the collector for some labels; once, it cannot be made twice.
    """

    def __init__(
        self,
        page_tokens: int,
        make: Callable[[dict[str, Any]], "StorageMetricsCollector"],
    ) -> None:
        self._page_tokens = page_tokens
        self._make = make
        self._collector: StorageMetricsCollector | None = None
        self._counts: dict[str, tuple[_Count, ...]] = {}
        self._stats: Callable[[], StorageMetrics | None] | None = None

    def attach(self, labels: dict[str, Any], stats: Callable[[], "StorageMetrics | None"]) -> None:
        """There is a storage tier from now on.

        Args:
            stats: what batches did since the last call.
        """
        if self._collector is None:
            collector = self._collector = self._make(labels)
            logs = {
                "prefetched_pages": collector.log_prefetched_tokens,
                "persisted_pages": collector.log_backuped_tokens,
                "found_pages": collector.log_storage_prefetch_hit_tokens,
            }
            unfulfilled = collector.log_storage_prefetch_unfulfilled_tokens
            for why, reason in _REASONS.items():
                logs[f"unfulfilled_{why.value}"] = partial(unfulfilled, reason=reason)
            self._counts = {
                event: (partial(_times, self._page_tokens, log),) for event, log in logs.items()
            }
        self._collector.labels = labels
        self._stats = stats

    def detach(self) -> None:
        """There is none any more."""
        self._stats = None

    def updates(self, event: str, pages: int) -> Sequence[Update]:
        """What says that there are so many more pages of an event of ours."""
        return [partial(count, pages) for count in self._counts.get(event, ())]

    def observe(self) -> None:
        """What batches of storage did since the last call."""
        if self._collector is not None and self._stats is not None:
            self._collector.log_storage_metrics(self._stats())


class StorageBatch(NamedTuple):
    """What storage was asked for at once.

    Attributes:
        kind: ``lookup``, ``read`` or ``write``.
        result: how much was done, one of ``RESULTS``.
        bytes: of what was done; 0 for a lookup.
    """

    kind: str
    result: str
    bytes: int
    seconds: float


class MeteredStore(EnginePageStore):
    """A page store that measures its batches.

    Lookups, reads and writes come from a thread each, and whoever takes the figures from another.

    Args:
        page_bytes: of a table page of each component.
    """

    def __init__(
        self,
        backend: "HiCacheStorage",
        pools: dict[Any, Any],
        indices: SlotIndices,
        page_bytes: Sequence[int],
    ) -> None:
        super().__init__(backend, pools, indices)
        self._page_bytes = page_bytes
        self._read: deque[tuple[int, float]] = deque(maxlen=_BATCHES)
        self._written: deque[tuple[int, float]] = deque(maxlen=_BATCHES)
        self._batches: deque[StorageBatch] = deque(maxlen=_BATCHES)

    def resume_points(self, keys: Sequence[Key], window: int) -> list[int]:
        """See PageStore."""
        with self._measured("lookup", len(keys), 0) as ended:
            found = super().resume_points(keys, window)
            ended(found[-1] if found else 0)
        return found

    def load(self, component: int, objects: Objects) -> int:
        """See PageStore."""
        with self._measured("read", len(objects), self._page_bytes[component]) as ended:
            seconds = ended(done := super().load(component, objects))
        self._note(self._read, component, done, seconds)
        return done

    def store(self, component: int, objects: Objects) -> int:
        """See PageStore."""
        with self._measured("write", len(objects), self._page_bytes[component]) as ended:
            seconds = ended(done := super().store(component, objects))
        self._note(self._written, component, done, seconds)
        return done

    @contextlib.contextmanager
    def _measured(self, kind: str, asked: int, size: int) -> Iterator[Callable[[int], float]]:
        """A batch of so many things of a size. What it gives is to be called with how many were
        done, and returns the seconds that it took; a batch that raises is an error."""
        start, result, done, seconds = time.perf_counter(), "error", 0, 0.0

        def ended(count: int) -> float:
            nonlocal result, done, seconds
            seconds = max(time.perf_counter() - start, 1e-9)
            result, done = "all" if count >= asked else "part" if count else "nothing", count
            return seconds

        try:
            yield ended
        finally:
            self._batches.append(StorageBatch(kind, result, done * size, seconds))

    def _note(
        self, batches: deque[tuple[int, float]], component: int, pages: int, seconds: float
    ) -> None:
        if pages:
            batches.append((pages, pages * self._page_bytes[component] / seconds / 1e9))

    def take_batches(self) -> list[StorageBatch]:
        """Those that have ended since the last call."""
        return [self._batches.popleft() for _ in range(len(self._batches))]

    def take_stats(self) -> "StorageMetrics":
        """What batches did since the last call: pages, and GB/s. A backend that measures
        itself, with the engine's own names, knows better."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        read, written = _taken(self._read), _taken(self._written)
        own: StorageMetrics | None = self.backend.get_stats()
        return own or StorageMetrics(
            prefetch_pgs=[pages for pages, _ in read],
            backup_pgs=[pages for pages, _ in written],
            prefetch_bandwidth=[speed for _, speed in read],
            backup_bandwidth=[speed for _, speed in written],
        )


def _taken(batches: deque[tuple[int, float]]) -> list[tuple[int, float]]:
    return [batches.popleft() for _ in range(len(batches))]
