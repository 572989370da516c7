"""Our own metrics: each prompt is counted once, and what has changed is published."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams

from sglang_ext.adapter import departures, metrics, transfer_lag
from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.departures import DeparturesSeen
from sglang_ext.adapter.engine_metrics import StorageBatch
from sglang_ext.adapter.exported import Exported
from sglang_ext.adapter.handles import Prefix
from sglang_ext.adapter.metric_definitions import Cause, Where
from sglang_ext.adapter.metrics import DeviceSizes, IndexMetrics
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.adapter.prompt_tokens import Found, PromptTokens
from sglang_ext.adapter.rolling_maximum import RollingMaximum
from sglang_ext.adapter.transfer_lag import TransferLag
from sglang_ext.core.host.arena import Arena, shape_for
from sglang_ext.core.plan import DeclineReason, TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.requests import whole_pages
from sglang_ext.testing.sizes import Sizes
from sglang_ext.transfer.job import Ended
from tests.fixtures.registry import own_registry

PAGE, WINDOW = 16, 32
LABELS = {"tp_rank": "0", "zone": "a"}
ENOUGH = 100
"""Steps of a round of publishing: more than it takes."""
DEVICE = DeviceSizes(page=(100, 40), pool=(800, 320))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> prometheus_client.CollectorRegistry:
    return own_registry(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that tests set."""
    now = SimpleNamespace(seconds=1000.0)
    time = SimpleNamespace(monotonic=lambda: now.seconds, perf_counter=lambda: now.seconds)
    for module in (metrics, departures, transfer_lag):
        monkeypatch.setattr(module, "time", time)
    return now


def value(registry: Any, name: str, **labels: str) -> float | None:
    found: float | None = registry.get_sample_value(f"sglang_ext:{name}", {**LABELS, **labels})
    return found


def prompt(pages: int, seed: int, more: int = 0) -> Any:
    """Tokens of whole pages, and some more."""
    return np.random.default_rng(seed).integers(0, 1 << 30, pages * PAGE + more, dtype=np.int64)


class Served:
    """A simulated engine whose requests are told to what counts them, as the adapter does."""

    def __init__(self, device: int, host: int = 0, host_windows: int = 0) -> None:
        sizes = Sizes(device, device, host, host_windows)
        self.engine = SimEngine(Geometry(PAGE, WINDOW), sizes)
        self.departures = DeparturesSeen(self.engine.index)
        self.engine.index.tell_departures(self.departures)
        self.prompts = PromptTokens(self.engine.geometry, self.departures)
        self.number = 0

    def ask(self, tokens: Any) -> dict[str, int]:
        """What its prompt was: tokens by tier and by cause."""
        engine = self.engine
        self.number += 1
        name = str(self.number)
        match = engine.index.match(whole_pages(tokens, engine.geometry), None)
        request = engine.start(tokens)
        loaded = engine.index.pending[TransferKind.LOAD].values()
        window = sum(len(load.window) for load in loaded)
        engine.settle()
        length = len(match.rows) * PAGE
        self.prompts.matched(name, Found(length, length, length + match.behind * PAGE))
        if window:
            self.prompts.loads(name, window)
        device = match.device_pages * PAGE
        req: Any = SimpleNamespace(
            rid=name,
            origin_input_ids=tokens,
            cached_tokens_device=device,
            cached_tokens_host=request.computed - device,
            cached_tokens_storage=0,
        )
        engine.compute(request, len(tokens))
        self.prompts.ended(req, request.path)
        self.departures.used(request.path)
        engine.finish(request)
        hits, computed = self.prompts.take_hits(), self.prompts.take_computed()
        counted = {f"{c} {tier}": n for (c, tier), n in hits if n}
        counted |= {cause.value: n for cause, n in computed if n}
        full = sum(n for (c, _), n in hits if c == "full")
        assert full + sum(n for _, n in computed) == len(tokens), "a token is counted once"
        return counted


def test_a_device_alone_evicts() -> None:
    served = Served(device=64)
    # a namespace is remembered as long as one of its pages is left: here the first one
    first, second, third = prompt(5, 1, more=3), prompt(63, 2), prompt(63, 3)
    assert served.ask(first) == {"new": 83}
    assert served.ask(first) == {"full device": 80, "swa device": 32, "new": 3}
    assert served.ask(second) == {"new": 1008}
    assert served.ask(first) == {"window_lost": 16, "evicted": 64, "new": 3}
    assert served.ask(third) == {"new": 1008}
    served.departures.clear()
    assert served.ask(first) == {"window_lost": 16, "new": 67}, "what was dropped is not evicted"


def test_the_host_brings_back_what_was_copied() -> None:
    served = Served(device=16, host=64, host_windows=64)
    first, second = prompt(5, 1, more=3), prompt(6, 2)
    assert served.ask(first) == {"new": 83}
    served.engine.settle()
    served.engine.index.evict_device(16, 16)
    assert served.ask(first) == {"full host": 80, "swa host": 32, "new": 3}
    served.ask(second)
    served.engine.index.evict_device(16, 16, abandon_backups=True)
    assert served.ask(second) == {"not_copied": 96}


def test_a_prompt_without_its_window_is_computed_from_the_last_one_that_is_left() -> None:
    served = Served(device=16)
    tokens = prompt(6, 1, more=3)
    served.ask(tokens)
    served.engine.index.evict_device(0, 16)
    assert served.ask(tokens) == {"window_lost": 96, "new": 3}
    assert served.prompts.take_recomputed() == [0, 96]
    assert served.prompts.take_recomputed() == []


@pytest.mark.parametrize(
    ("tiers", "found", "expected"),
    [
        ((32, 0, 0), Found(64, 96, 128), (32, 32, 32, 72)),
        # the last match is older than what the request was given
        ((96, 32, 0), Found(64, 64, 64), (0, 0, 0, 72)),
        ((200, 0, 0), Found(200, 208, 240), (0, 0, 0, 0)),
    ],
)
def test_what_a_request_did_not_get_is_counted_by_its_cause(
    tiers: tuple[int, int, int], found: Found, expected: tuple[int, ...]
) -> None:
    served = Served(device=16)
    served.prompts.matched("r", found)
    served.prompts.loads("r", 1)
    req: Any = SimpleNamespace(rid="r", origin_input_ids=range(200))
    req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = tiers
    served.prompts.ended(req, np.empty(0, dtype=np.int64))
    causes = (Cause.DECLINED, Cause.INADMISSIBLE, Cause.WINDOW_LOST, Cause.NEW)
    computed, hits = dict(served.prompts.take_computed()), dict(served.prompts.take_hits())
    assert tuple(computed[cause] for cause in causes) == expected
    assert hits["swa", "host"] == PAGE
    assert hits["swa", "device"] == PAGE


def test_the_window_that_storage_brought_is_storages() -> None:
    served = Served(device=16)
    served.prompts.loads("r", 2)
    req: Any = SimpleNamespace(rid="r", origin_input_ids=range(100))
    req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = 16, 0, 16
    served.prompts.ended(req, np.empty(0, dtype=np.int64))
    hits = dict(served.prompts.take_hits())
    assert hits["swa", "storage"] == 16
    assert hits["swa", "host"] == 16


def test_requests_that_never_end_are_forgotten() -> None:
    served = Served(device=16)
    for number in range(20_000):
        served.prompts.matched(str(number), Found(0, 0, 0))
        served.prompts.loads(str(number), 0)
    assert len(served.prompts) < 10_000


def test_ages_of_what_is_evicted(clock: SimpleNamespace) -> None:
    served = Served(device=16, host=4, host_windows=4)
    served.ask(prompt(4, 1))
    served.engine.settle()
    clock.seconds += 7
    served.engine.index.evict_device(0, 4)
    clock.seconds += 5
    served.engine.index.evict_device(4, 0)
    assert served.departures.take_ages() == [("swa", "device", 7.0), ("full", "device", 12.0)]
    clock.seconds += 1
    served.engine.press_host(pages=4)
    assert set(served.departures.take_ages()) == {("full", "host", 13.0)}
    assert served.departures.take_ages() == []


def test_a_maximum_is_of_the_last_while() -> None:
    largest = RollingMaximum(10.0)
    largest.note(5, 100.0)
    largest.note(3, 104.0)
    assert largest.value(104.5) == 5
    largest.note(2, 106.0)
    assert largest.value(109.0) == 5, "it counts for half of the time at least"
    assert largest.value(111.0) == 2
    assert largest.value(300.0) == 0


def test_lag_is_from_the_decision_to_the_end(clock: SimpleNamespace) -> None:
    engine = Served(device=16, host=16, host_windows=16).engine
    lag = TransferLag(engine.index)
    for op in (0, 1):
        engine.index.pending[TransferKind.BACKUP][op] = None  # type: ignore[assignment]
        lag.begun(TransferKind.BACKUP, op)
        clock.seconds += 1
    lag.look()
    assert lag.take() == []
    del engine.index.pending[TransferKind.BACKUP][0]
    lag.look()
    del engine.index.pending[TransferKind.BACKUP][1]
    clock.seconds += 1
    lag.look()
    assert lag.take() == [(TransferKind.BACKUP, 2.0), (TransferKind.BACKUP, 2.0)]
    assert lag.take() == []


def test_what_has_changed_is_published_a_few_times_a_second(
    registry: Any, clock: SimpleNamespace
) -> None:
    index = SimEngine(Geometry(PAGE, PAGE), Sizes(8, 8)).index
    exported = IndexMetrics(index, LABELS, DEVICE, None)
    told: list[tuple[str, int]] = []
    exported.host = SimpleNamespace(updates=lambda *event: [partial(told.append, event)])  # type: ignore[assignment]
    declined = {"reason": "backlog"}
    assert value(registry, "declined_total", **declined) == 0, "there from the start"
    index.counters.decline(DeclineReason.BACKLOG)
    exported.publish()
    assert told == [], "it has just published"
    clock.seconds += 1
    for _ in range(2 * ENOUGH):
        exported.publish()
    assert told == [("declined_backlog", 1)]
    index.counters.decline(DeclineReason.BACKLOG)
    index.counters.unsaved_pages += 3
    exported.publish(at_once=True)
    assert told[1:] == [("unsaved_pages", 3), ("declined_backlog", 1)]
    assert value(registry, "declined_total", **declined) == 2
    assert value(registry, "kv_tokens_total", component="full", event="unsaved") == 3 * PAGE
    assert value(registry, "device_pool_bytes", component="swa") == 320
    assert value(registry, "transfers_in_flight", direction="load") is None, "there is no host"


def test_without_a_host_tier_each_batch_publishes_and_the_last_one_at_once() -> None:
    """The engine asks such a cache for nothing in a step."""
    served = Served(device=16)
    served.ask(prompt(4, 1))
    index = served.engine.index
    params = SimpleNamespace(
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        page_size=PAGE,
        draft_swa_window=0,
    )
    roomy = Admission(pool=1 << 30, window=WINDOW, page=1, chunk=None)
    cache: Any = SwaHiCache(params, index, served.engine.device, roomy)  # type: ignore[arg-type]
    published: list[bool] = []
    cache.metrics = SimpleNamespace(publish=lambda *, at_once: published.append(at_once))
    rows = index.table.path(int(np.flatnonzero(index.table.device.present)[-1]))
    node = Prefix(rows, int(index.table.generation[rows[-1]]))
    receipt = cache.inc_lock_ref(node)
    cache.flush_pending_backups()
    cache.dec_lock_ref(node, DecLockRefParams(node_id=receipt.node_id))
    cache.flush_pending_backups()
    assert published == [False, True]


def test_a_label_of_ours_cannot_be_asked_for_once_more() -> None:
    said = r"--extra-metric-labels tier='gold': .* allowed are others than cache_salt, cause, class"
    with pytest.raises(StartupError, match=said):
        Exported({"tp_rank": "0", "tier": "gold"}, [Where.ALL])


def test_bytes_of_each_tier(registry: Any) -> None:
    engine = SimEngine(Geometry(PAGE, WINDOW), Sizes(8, 8))
    exported = IndexMetrics(engine.index, LABELS, DEVICE, None)
    request = engine.start(prompt(5, 1))
    engine.compute(request, 5 * PAGE)

    def device(component: str, state: str) -> float | None:
        return value(registry, "kv_bytes", component=component, tier="device", state=state)

    exported.publish(at_once=True)
    assert (device("full", "pinned"), device("full", "evictable")) == (500, 0)
    engine.finish(request)
    exported.publish(at_once=True)
    assert (device("full", "pinned"), device("full", "evictable")) == (0, 500)
    assert device("swa", "evictable") == 40 * engine.index.table.swa_device.n_present > 0


def test_transfers_and_storage(registry: Any, clock: SimpleNamespace) -> None:
    engine = SimEngine(Geometry(PAGE, WINDOW), Sizes(8, 8, 8, 8))
    arena = Arena(shape_for(100_000, ((60, 40), (24, 16)), 1))
    exported = IndexMetrics(engine.index, LABELS, DEVICE, arena)
    seen: list[tuple[str, float]] = []
    exported.host = SimpleNamespace(  # type: ignore[assignment]
        updates=lambda *_: (), observe=lambda *job: seen.append(job)
    )
    exported.take_ended = lambda: ([Ended(0.5, ((0, 3), (1, 2)))], [Ended(0.25, ((1, 1),))])
    exported.take_waits = lambda: [1.5]
    read = StorageBatch("read", "part", 300, 0.125)
    exported.take_batches = lambda: [read, StorageBatch("lookup", "all", 0, 1.0)]
    exported.files = lambda: {"damaged": 2}
    exported.publish(at_once=True)
    assert seen == [("backup", 0.5), ("load", 0.25)]
    for direction, size, seconds in (
        ("backup", 380, 0.5),
        ("load", 40, 0.25),
        ("read", 300, 0.125),
        ("write", 0, 0),
    ):
        assert value(registry, "transfer_bytes_sum", direction=direction) == size
        assert value(registry, "transfer_seconds_sum", direction=direction) == seconds
    operations = {"kind": "read", "result": "part"}
    assert value(registry, "storage_operations_total", **operations) == 1
    assert value(registry, "storage_wait_seconds_sum") == 1.5
    assert value(registry, "storage_files_total", event="damaged") == 2
    assert value(registry, "host_memory_bytes", use="free") > 90_000
    exported.files = lambda: {"damaged": 1}  # another backend, which counts from the start
    exported.publish(at_once=True)
    exported.files = lambda: {"damaged": 4}
    exported.publish(at_once=True)
    assert value(registry, "storage_files_total", event="damaged") == 5


def test_a_recompute_counts_in_the_histogram_and_in_the_maximum(
    registry: Any, clock: SimpleNamespace
) -> None:
    engine = SimEngine(Geometry(PAGE, WINDOW), Sizes(8, 8))
    exported = IndexMetrics(engine.index, LABELS, DEVICE, None)
    req: Any = SimpleNamespace(rid="r", origin_input_ids=range(200), retracted_stain=False)
    req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage = 32, 0, 0
    rows = np.empty(0, dtype=np.int64)
    exported.matched(req, rows, Found(32, 32, 192))
    again: Any = SimpleNamespace(rid="r", retracted_stain=True)
    exported.matched(again, rows, Found(199, 199, 199))  # after a retraction it finds itself
    exported.ended(req, rows)
    exported.publish(at_once=True)
    assert value(registry, "recompute_max_tokens") == 160
    assert value(registry, "recompute_tokens_sum") == 160
    assert value(registry, "computed_tokens_total", cause="window_lost") == 160
    assert value(registry, "hit_tokens_total", component="full", tier="device") == 32
    clock.seconds += 2000
    for _ in range(ENOUGH):
        exported.publish()
    assert value(registry, "recompute_max_tokens") == 0


def test_who_stays_how_long_is_told_by_class(registry: Any) -> None:
    """A prompt that comes again and again beside some that do not."""
    engine = SimEngine(Geometry(PAGE, WINDOW), Sizes(64, 64, eviction="learned"))
    exported = IndexMetrics(engine.index, LABELS, DEVICE, None)
    turn_2 = {"class": "turn 2, little new"}
    assert value(registry, "retention_returns_ratio", **turn_2) == 0
    for number in range(400):
        tokens = prompt(4, 1) if number % 2 else prompt(4, 1000 + number)
        request = engine.start(tokens)
        engine.compute(request, len(tokens))
        engine.finish(request)
    exported.publish(at_once=True)
    estimates = engine.index.expiry.estimate.explain()  # type: ignore[union-attr]
    returns = {
        row["class"]: value(registry, "retention_returns_ratio", **{"class": row["class"]})
        for row in estimates
    }
    assert returns == {row["class"]: pytest.approx(row["returns"], abs=1e-3) for row in estimates}
    assert max(returns.values()) > 0.5
    stay = value(registry, "retention_stay_requests", **turn_2)
    assert stay is not None
    assert stay > 0
