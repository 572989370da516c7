"""What the cache does, as metrics of the engine's own endpoint."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_ext.adapter.departures import DeparturesSeen
from sglang_ext.adapter.engine_metrics import HostTierFeed, StorageBatch, StorageFeed
from sglang_ext.adapter.exported import Exported
from sglang_ext.adapter.metric_definitions import COMPONENTS, EVENTS, TOKEN_EVENTS, Where
from sglang_ext.adapter.prompt_tokens import Found, PromptTokens
from sglang_ext.adapter.publishing import Publishing, Update
from sglang_ext.adapter.rolling_maximum import RollingMaximum
from sglang_ext.adapter.transfer_lag import TransferLag
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.bins import BINS, EDGES
from sglang_ext.core.compiled.returns import UNIT
from sglang_ext.core.counters import NAMES
from sglang_ext.core.host.arena import Arena
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.retention.expiry import Expiry
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.window import promised
from sglang_ext.transfer.job import Ended

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_EVERY_S = 0.25
"""From the end of a round to the next. A scrape comes far less often."""
_RECOMPUTE_S = 600.0
_REMAINDER = 1000
"""Requests within which a page of a class is said to return."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Bytes on the device; (full attention, window) each, 0 for what a model has not.

    Attributes:
        page: of a table page.
        pool: of the engine's pool.
    """

    page: tuple[int, int]
    pool: tuple[int, int]


def _nothing_ended() -> tuple[list[Ended], list[Ended]]:
    return [], []


class IndexMetrics:
    """Publishes what has changed, a few times a second, and feeds the engine's own metrics.

    Args:
        labels: of the engine's metrics of its cache.
        sizes: of the device.
        arena: the host memory, None without one.

    Attributes:
        prompts: where the tokens of prompts come from.
        lag: of transfers.
        files: what has happened to files of pages, if storage is a directory.
        take_ended: jobs of copies that have ended, see ``TransferEngine``.
        take_waits: seconds that requests waited for storage.
        take_batches: of storage.
        host: feeds the engine's metrics of its host tier, None without one.
        storage: feeds the engine's metrics of a storage tier, None without a host tier.
    """

    def __init__(
        self,
        index: PrefixCache,
        labels: dict[str, Any],
        sizes: DeviceSizes,
        arena: Arena | None,
    ) -> None:
        where = {Where.ALL}
        if arena is not None:
            where.add(Where.HOST)
        if isinstance(index.expiry, Expiry):
            where.add(Where.LEARNED)
        self._exported = Exported(labels, where)
        self._index = index
        self._arena = arena
        self._page = index.geometry.page_tokens
        self._page_bytes = sizes.page
        self._departures = DeparturesSeen(index)
        index.tell_departures(self._departures)
        self.prompts = PromptTokens(index.geometry, self._departures)
        self.lag = TransferLag(index)
        self._recompute = RollingMaximum(_RECOMPUTE_S)
        self.files: Callable[[], dict[str, int]] = dict
        self.take_ended: Callable[[], tuple[list[Ended], list[Ended]]] = _nothing_ended
        self.take_waits: Callable[[], Iterable[float]] = tuple
        self.take_batches: Callable[[], Iterable[StorageBatch]] = tuple
        self.host: HostTierFeed | None = None
        self.storage: StorageFeed | None = None
        self._publishing = Publishing(
            (
                self._counters_changed,
                self._prompts_ended,
                self._transfers_ended,
                self._files_changed,
                self._state_changed,
                self._quotas_changed,
                self._retention_learned,
            )
        )
        self._due = 0.0
        self._total = 0
        self._counted: tuple[int, ...] = (0,) * len(NAMES)
        self._files_counted: dict[str, int] = {}
        self._counters = dict(self._of_core())
        # in the order of ``_state_changed``
        self._gauges = [self._exported.child(*key) for key in self._state_keys()]
        self._shown: tuple[float | None, ...] = (None,) * len(self._gauges)
        self._seen: tuple[Any, ...] = ()
        # (used, quota) of namespaces
        self._quotas: dict[Hashable, tuple[int, int]] = {}
        self._estimate: Any = None
        for component, size in zip(COMPONENTS, sizes.pool, strict=True):
            self._exported.child("device_pool_bytes", component).set(size)
        if arena is not None:
            policy = index.policy
            bound = promised(index.geometry, policy.checkpoint_pages, policy.dense_pages)
            # a bound is a distance between windows, and a page: 0 for none
            most = bound.always + self._page if bound.always else 0
            self._exported.child("recompute_bound_tokens").set(most)
        self.publish(at_once=True)

    def _of_core(self) -> Iterable[tuple[str, tuple[Any, int]]]:
        """Of each counter of the core that is exported: its metric, and in what it counts."""
        child = self._exported.child
        for event, names in TOKEN_EVENTS.items():
            for component, name in zip(COMPONENTS, names, strict=True):
                if name is not None:
                    yield name, (child("kv_tokens_total", component, event), self._page)
        for name in EVENTS:
            yield name, (child("cache_events_total", name), 1)
        for name in NAMES:
            kind, _, reason = name.partition("_")
            if kind == "declined":
                yield name, (child("declined_total", reason), 1)
            elif kind == "unfulfilled" and self._arena is not None:
                yield name, (child("unfulfilled_tokens_total", reason), self._page)

    # ---- requests ------------------------------------------------------------

    def used(self, rows: Rows) -> None:
        """A request uses a path now."""
        self._departures.used(rows)

    def matched(self, req: "Req | None", rows: Rows, found: Found) -> None:
        """A request that waits was matched.

        Args:
            rows: what it was offered.
        """
        self._departures.used(rows)
        if req is not None and not req.retracted_stain:
            self.prompts.matched(req.rid, found)

    def ended(self, req: "Req", rows: Rows) -> None:
        """A request has ended.

        Args:
            rows: its path.
        """
        self._departures.used(rows)
        self.prompts.ended(req, rows)

    def flushed(self) -> None:
        """Everything was dropped."""
        self._departures.clear()

    # ---- publish -------------------------------------------------------------

    def publish(self, *, at_once: bool = False) -> None:
        """Publish what has changed. Most steps look at a clock and do nothing; a few times a second
        some in a row do a part of it each.

        Args:
            at_once: all of it, whatever the time: nobody waits, and nobody may come by for long.
        """
        if at_once:
            self._publishing.whole()
        elif time.monotonic() < self._due or not self._publishing.step():
            return
        self._due = time.monotonic() + _EVERY_S

    def _counters_changed(self) -> Iterable[Update]:
        total = self._index.counters.total()
        if total == self._total:
            return ()
        before, self._counted = self._counted, self._index.counters.numbers()
        self._total = total
        return self._counts(before, self._counted)

    def _counts(self, before: Sequence[int], now: Sequence[int]) -> Iterator[Update]:
        feeds = [feed for feed in (self.host, self.storage) if feed is not None]
        for name, number, former in zip(NAMES, now, before, strict=True):
            if number == former:
                continue
            for feed in feeds:
                yield from feed.updates(name, number - former)
            if name in self._counters:
                counter, factor = self._counters[name]
                yield partial(counter.inc, (number - former) * factor)

    def _prompts_ended(self) -> Iterator[Update]:
        child = self._exported.child
        for recomputed in self.prompts.take_recomputed():
            yield partial(self._note_recomputed, recomputed)
        for (component, tier), tokens in self.prompts.take_hits():
            yield partial(child("hit_tokens_total", component, tier).inc, tokens)
        for cause, tokens in self.prompts.take_computed():
            yield partial(child("computed_tokens_total", cause.value).inc, tokens)
        for component, tier, seconds in self._departures.take_ages():
            yield partial(child("eviction_age_seconds", component, tier).observe, seconds)

    def _note_recomputed(self, tokens: int) -> None:
        self._recompute.note(tokens, time.monotonic())
        self._exported.child("recompute_tokens").observe(tokens)

    def _transfers_ended(self) -> Iterator[Update]:
        if self._arena is None:
            return
        child = self._exported.child
        for direction, jobs in zip(("backup", "load"), self.take_ended(), strict=True):
            for job in jobs:
                yield from self._observations(direction, self._job_bytes(job), job.seconds)
                if self.host is not None:
                    yield partial(self.host.observe, direction, job.seconds)
        for kind, seconds in self.lag.take():
            yield partial(child("transfer_lag_seconds", kind.value).observe, seconds)
        for seconds in self.take_waits():
            yield partial(child("storage_wait_seconds").observe, seconds)
        for batch in self.take_batches():
            yield child("storage_operations_total", batch.kind, batch.result).inc
            if batch.bytes:
                yield from self._observations(batch.kind, batch.bytes, batch.seconds)
        if self.storage is not None:
            yield self.storage.observe

    def _observations(self, direction: str, size: int, seconds: float) -> Iterator[Update]:
        yield partial(self._exported.child("transfer_bytes", direction).observe, size)
        yield partial(self._exported.child("transfer_seconds", direction).observe, seconds)

    def _job_bytes(self, job: Ended) -> int:
        per_page = self._index.geometry.slots_per_page
        return (
            sum(slots * self._page_bytes[component] for component, slots in job.slots) // per_page
        )

    def _files_changed(self) -> Iterator[Update]:
        files = self.files()
        if files == self._files_counted:
            return
        before, self._files_counted = self._files_counted, files
        for event, total in files.items():
            # whoever attaches storage anew begins to count anew
            if (change := total - before.get(event, 0)) > 0:
                yield partial(self._exported.child("storage_files_total", event).inc, change)

    def _state_keys(self) -> Iterable[tuple[str, ...]]:
        """Its gauges."""
        yield ("recompute_max_tokens",)
        yield ("retention_learned",)
        yield ("retention_price_uses",)
        for tier in ("device", "host"):
            for component in COMPONENTS:
                for state in ("evictable", "pinned"):
                    yield "kv_bytes", component, tier, state
        if self._arena is not None:
            yield ("host_sampling",)
            for use in self._arena.usage():
                yield "host_memory_bytes", use
            for direction in ("backup", "load", "write", "read", "lookup"):
                yield "transfers_in_flight", direction
            for tier in ("device", "host"):
                yield "pinned_tokens", tier

    def _state_changed(self) -> Iterator[Update]:
        index, arena = self._index, self._arena
        pages = [(column.n_present, column.n_locked) for column in self._columns()]
        decisions = (
            self._recompute.value(time.monotonic()),
            index.expiry.is_learned,
            index.expiry.uses_per_1000,
        )
        on_host: tuple[int, ...] = ()
        if arena is not None:
            pending = index.pending
            on_host = (
                index.sampling.is_on,
                arena.changes,
                len(pending[TransferKind.BACKUP]),
                len(pending[TransferKind.LOAD]),
                len(index.persists.writing),
                len(index.prefetches.reading),
                len(index.prefetches.lookups),
                *(
                    int(np.count_nonzero(column.ready[index.pins.rows])) * self._page
                    for column in (index.table.device, index.table.host)
                ),
            )
        seen = (*pages, *decisions, *on_host)
        if seen == self._seen:
            return
        self._seen = seen
        state: list[float] = [*decisions[:2], decisions[2] / 1000]
        for (present, locked), size in zip(pages, self._page_bytes * 2, strict=True):
            state += ((present - locked) * size, locked * size)
        if arena is not None:
            state += (on_host[0], *arena.usage().values(), *on_host[2:])
        shown, self._shown = self._shown, tuple(state)
        for gauge, value, before in zip(self._gauges, state, shown, strict=True):
            if value != before:
                yield partial(gauge.set, value)

    def _quotas_changed(self) -> Iterator[Update]:
        """As many gauges as there are quotas; namespaces without one are too many."""
        index, shown = self._index, self._quotas
        if not index.quotas.bounds and not shown:
            return
        used = index.own_room.used_at_last_look
        self._quotas = {name: (used(name), most) for name, most in index.quotas.bounds.items()}
        for name in {**shown, **self._quotas}:
            now = self._quotas.get(name, (0, 0))
            if now == shown.get(name):
                continue
            assert isinstance(name, tuple)
            labels = [key or "" for key in name]
            for state, value in zip(("used", "quota"), now, strict=True):
                yield partial(self._exported.child("namespace_bytes", *labels, state).set, value)

    def _columns(self) -> tuple[SlotColumn, ...]:
        table = self._index.table
        return table.device, table.swa_device, table.host, table.swa_host

    def _retention_learned(self) -> Iterator[Update]:
        """Who is kept how long; there is another table every few hundred requests."""
        expiry = self._index.expiry
        if not isinstance(expiry, Expiry) or expiry.estimate is self._estimate:
            return
        self._estimate = estimate = expiry.estimate
        worthless = estimate.values <= expiry.price
        stay = EDGES[np.where(worthless.any(axis=1), worthless.argmax(axis=1), BINS)]
        for kind, row in enumerate(estimate.explain()):
            returns = estimate.returns_within(kind, 1, _REMAINDER) / (1 << UNIT)
            child = self._exported.child
            yield partial(child("retention_stay_requests", row["class"]).set, int(stay[kind]))
            yield partial(child("retention_returns_ratio", row["class"]).set, returns)
