"""Every metric of ours: its name, unit, labels and meaning, as data.

Names follow Prometheus: base units (tokens, bytes, seconds), ``_total`` for what only grows, no
other unit in a metric. ``docs/metrics.md`` is written from here.
"""

import dataclasses
import enum

from sglang_ext.core.counters import Unfulfilled
from sglang_ext.core.plan import DeclineReason

PREFIX = "sglang_ext:"
_SECONDS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
_AGES = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_BYTES = tuple(float(1 << bits) for bits in range(12, 37, 3))
_TOKENS = (0.0, 16.0, 64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 65536.0)


class Kind(enum.Enum):
    """What Prometheus calls a type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Where(enum.Enum):
    """Which servers have a metric."""

    ALL = "all"
    HOST = "host tier"
    LEARNED = "learned retention"


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """A metric.

    Attributes:
        name: without PREFIX.
        labels: of ours, beside those of the engine; with all their values, but for a label whose
            values are only known later.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: Kind
    text: str
    labels: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    where: Where = Where.ALL


class Cause(enum.Enum):
    """Why tokens of a prompt were computed."""

    NEW = "new"
    EVICTED = "evicted"
    NOT_COPIED = "not_copied"
    WINDOW_LOST = "window_lost"
    INADMISSIBLE = "inadmissible"
    DECLINED = "declined"


COMPONENTS = ("full", "swa")
TOKEN_EVENTS = {
    "backed_up": ("backed_up_pages", "backed_up_window_pages"),
    "loaded": ("loaded_pages", "loaded_window_pages"),
    "persisted": ("persisted_pages", "persisted_window_pages"),
    "unpersisted": ("unpersisted_pages", "unpersisted_window_pages"),
    "found": ("found_pages", None),
    "prefetched": ("prefetched_pages", "prefetched_window_pages"),
    "lost_prefetched": ("lost_prefetched_pages", "lost_prefetched_window_pages"),
    "demoted": ("demoted_pages", None),
    "unsaved": ("unsaved_pages", None),
    "dropped": ("dropped_pages", "dropped_window_pages"),
    "evicted_host": ("evicted_host_pages", "evicted_host_window_pages"),
    "moved_host": ("moved_host_pages", "moved_host_window_pages"),
    "reclaimed_duplicate": ("reclaimed_duplicate_pages", "reclaimed_duplicate_window_pages"),
}
"""Events that the core counts in pages: its counter of each component, None where there is none."""
EVENTS = (
    "failed_transfers",
    "abandoned_transfers",
    "cancelled_prefetches",
    "collisions",
    "copied_inside",
    "inadmissible",
)
"""Counters of the core that count something else."""
_DIRECTIONS = ("backup", "load", "write", "read")
RESULTS = ("all", "part", "nothing", "error")
"""How a batch of storage ended."""

METRICS = (
    Definition(
        "hit_tokens_total",
        Kind.COUNTER,
        "Tokens of prompts that were not computed, by the tier where they were found; of `swa`, "
        "those of the window that a request resumes with. Of requests that have ended.",
        {"component": COMPONENTS, "tier": ("device", "host", "storage")},
    ),
    Definition(
        "computed_tokens_total",
        Kind.COUNTER,
        "Tokens of prompts that were computed, by cause: `new` never seen, or not remembered; "
        "`evicted` seen before, gone from the last tier; `not_copied` seen before, gone from the "
        "device without a copy on the host; `window_lost` cached, but no window to resume from; "
        "`inadmissible` cached, but the engine could not have admitted the request with them; "
        "`declined` cached, but the load did not begin. With `hit_tokens_total` of `full` they "
        "are all tokens of all prompts.",
        {"cause": tuple(cause.value for cause in Cause)},
    ),
    Definition(
        "recompute_tokens",
        Kind.HISTOGRAM,
        "Cached tokens of a prompt that were computed again for want of a window, by request.",
        buckets=_TOKENS,
    ),
    Definition(
        "recompute_max_tokens",
        Kind.GAUGE,
        "The most of these in one request of the last 10 minutes.",
    ),
    Definition(
        "recompute_bound_tokens",
        Kind.GAUGE,
        "The most of them that a prompt needs, as long as the host keeps all of its windows.",
        where=Where.HOST,
    ),
    Definition(
        "kv_tokens_total",
        Kind.COUNTER,
        "Tokens whose KV was copied (`backed_up` device to host, `loaded` host to device, "
        "`persisted` host to storage, `prefetched` storage to host), was not copied "
        "(`unpersisted`, `lost_prefetched`), was found in storage (`found`), left the device "
        "(`demoted` to the host, `unsaved` without a copy there), left the last tier but storage "
        "(`dropped`), left the host (`evicted_host`, `reclaimed_duplicate` of what the device "
        "has), or moved within it (`moved_host`).",
        {"component": COMPONENTS, "event": tuple(TOKEN_EVENTS)},
    ),
    Definition(
        "kv_bytes",
        Kind.GAUGE,
        "KV that is in a tier; `pinned` by requests, transfers or an operator, or `evictable`.",
        {
            "component": COMPONENTS,
            "tier": ("device", "host"),
            "state": ("evictable", "pinned"),
        },
    ),
    Definition(
        "device_pool_bytes",
        Kind.GAUGE,
        "Size of the engine's device pools.",
        {"component": COMPONENTS},
    ),
    Definition(
        "host_memory_bytes",
        Kind.GAUGE,
        "Host memory by use: pages of full attention, pages of windows, holes between them, free.",
        {"use": ("full", "window", "holes", "free")},
        where=Where.HOST,
    ),
    Definition(
        "pinned_tokens",
        Kind.GAUGE,
        "Tokens of prompts that an operator has pinned, and how many of them each tier has.",
        {"tier": ("device", "host")},
        where=Where.HOST,
    ),
    Definition(
        "namespace_bytes",
        Kind.GAUGE,
        "Of each namespace that has a quota: what it has `used` of the host, and its `quota`. Both "
        "are 0 when it has none any more.",
        {"extra_key": (), "cache_salt": (), "state": ("used", "quota")},
        where=Where.HOST,
    ),
    Definition(
        "transfer_bytes",
        Kind.HISTOGRAM,
        "Bytes of one job: `backup` device to host, `load` host to device, `write` host to "
        "storage, `read` storage to host.",
        {"direction": _DIRECTIONS},
        _BYTES,
        Where.HOST,
    ),
    Definition(
        "transfer_seconds",
        Kind.HISTOGRAM,
        "Time that the copies of one job took, without what they waited for.",
        {"direction": _DIRECTIONS},
        _SECONDS,
        Where.HOST,
    ),
    Definition(
        "transfer_lag_seconds",
        Kind.HISTOGRAM,
        "Time from the decision to the end of a transfer, as the scheduler sees it: how far "
        "`backup`s are behind, and at most how long a request waits for its `load`.",
        {"direction": ("backup", "load")},
        _SECONDS,
        Where.HOST,
    ),
    Definition(
        "transfers_in_flight",
        Kind.GAUGE,
        "Transfers and lookups that have begun and not ended.",
        {"direction": (*_DIRECTIONS, "lookup")},
        where=Where.HOST,
    ),
    Definition(
        "storage_wait_seconds",
        Kind.HISTOGRAM,
        "Time that a request waited for storage before it was scheduled.",
        buckets=_SECONDS,
        where=Where.HOST,
    ),
    Definition(
        "storage_operations_total",
        Kind.COUNTER,
        "Batches of storage by kind, and how much of each was done.",
        {"kind": ("lookup", "read", "write"), "result": RESULTS},
        where=Where.HOST,
    ),
    Definition(
        "storage_files_total",
        Kind.COUNTER,
        "Files of pages that were missing, damaged, foreign, not written for want of room, "
        "failed, or removed.",
        {"event": ("missing", "damaged", "foreign", "full", "failed", "removed")},
        where=Where.HOST,
    ),
    Definition(
        "unfulfilled_tokens_total",
        Kind.COUNTER,
        "Tokens that storage had for a request that did not get them, by reason.",
        {"reason": tuple(reason.value for reason in Unfulfilled)},
        where=Where.HOST,
    ),
    Definition(
        "declined_total",
        Kind.COUNTER,
        "Transfers that were not begun, by reason.",
        {"reason": tuple(reason.value for reason in DeclineReason)},
    ),
    Definition(
        "cache_events_total",
        Kind.COUNTER,
        "Transfers that failed or were given up for eviction, prefetches that nobody waited for "
        "any more, digests that collided, requests that got a page of their own, matches that "
        "were cut so that the engine can admit them.",
        {"event": EVENTS},
    ),
    Definition(
        "eviction_age_seconds",
        Kind.HISTOGRAM,
        "Time since the last use of what was evicted, the mean of each eviction. `full` and `swa` "
        "of the device, `full` of the host.",
        {"component": COMPONENTS, "tier": ("device", "host")},
        _AGES,
    ),
    Definition(
        "host_sampling",
        Kind.GAUGE,
        "1 while nobody reads the host and only a sample of the prefixes is copied.",
        where=Where.HOST,
    ),
    Definition(
        "retention_learned",
        Kind.GAUGE,
        "1 while what is expected back decides who stays, 0 while recency does.",
    ),
    Definition(
        "retention_price_uses",
        Kind.GAUGE,
        "What pages were worth that had to go, in uses a request.",
    ),
    Definition(
        "retention_stay_requests",
        Kind.GAUGE,
        "How many requests a page of a class stays without a use, if what is learned decides.",
        {"class": ()},
        where=Where.LEARNED,
    ),
    Definition(
        "retention_returns_ratio",
        Kind.GAUGE,
        "Share of the pages of a class that are used again within 1,000 requests.",
        {"class": ()},
        where=Where.LEARNED,
    ),
)
