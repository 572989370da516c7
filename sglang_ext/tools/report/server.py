"""A page about a running server."""

import itertools
from collections.abc import Mapping

from sglang_ext.tools.report import units
from sglang_ext.tools.report.charts import Axis, Series, bars, columns, curves
from sglang_ext.tools.report.observed import Observed
from sglang_ext.tools.report.page import Section, page
from sglang_ext.tools.scrape import Metrics

TIERS = {"device": "c1", "host": "c2", "storage": "c3"}
CAUSES = {
    "new": "never seen, or not remembered",
    "evicted": "seen before, gone from the last tier",
    "not_copied": "gone from the device without a copy on the host",
    "window_lost": "cached, but without a window to resume from",
    "inadmissible": "cached, but the engine had no room for it",
    "declined": "cached, but the load did not begin",
}
DIRECTIONS = {
    "backup": ("device to host", "c1"),
    "load": ("host to device", "c2"),
    "write": ("host to storage", "c3"),
    "read": ("storage to host", "c4"),
}
_ONE = {"tp_rank": "0", "pp_rank": "0"}
"""Ranks of a request hold the same pages, and so do the stages of a pipeline: tokens are those of
one of them, bytes are of all."""
_P = "sglang_ext:"
_TIME = Axis("time since the first look", units.seconds)
_SINCE_START, _NOW = "since the server's start", "in this time"


def server_page(seen: Observed, address: str, when: str) -> str:
    """The file.

    Args:
        address: of the server.
        when: the time of the first look.
    """
    observed_s = seen.times[-1]
    found, computed = _found(seen), _computed(seen)
    whole = sum(found.values()) + sum(computed.values())
    bounds = "since its start" if not whole else f"in {units.seconds(observed_s)}"
    if not whole:
        found, computed = _found_ever(seen.last), _computed_ever(seen.last)
        whole = sum(found.values()) + sum(computed.values())
    moved = {way: seen.last.total(f"{_P}transfer_bytes_sum", direction=way) for way in DIRECTIONS}
    declined = sum(seen.last.by("reason", f"{_P}declined_total", **_ONE).values())
    figures = [
        (f"of prompt tokens found, {bounds}", _share(sum(found.values()), whole)),
        *(
            (f"found {'in' if tier == 'storage' else 'on the'} {tier}", _share(number, whole))
            for tier, number in found.items()
        ),
        (f"prompt tokens, {bounds}", units.count(whole)),
        ("moved to the host, since start", units.size(moved["backup"])),
        ("moved back, since start", units.size(moved["load"])),
        ("transfers declined, since start", units.count(declined)),
    ]
    about = f"{address}, {when}, watched for {units.seconds(observed_s)}"
    return page(
        "Prefix cache report",
        about,
        figures,
        [
            Section("Hits", [*_hits(seen), _recompute(seen)]),
            Section("Occupancy", _occupancy(seen)),
            Section("Retention", _retention(seen.last)),
            Section("Transfers", [*_moved(seen), *_refused(seen)]),
        ],
        "Written by sglang-ext report from the server's /metrics. Tokens are those of one tensor "
        "parallel rank and of the first stage of a pipeline, bytes are of all ranks.",
    )


def _found(seen: Observed) -> dict[str, float]:
    return {tier: sum(_hit_changes(seen, tier)) for tier in TIERS}


def _computed(seen: Observed) -> dict[str, float]:
    return {cause: sum(_computed_changes(seen, cause)) for cause in CAUSES}


def _found_ever(last: Metrics) -> dict[str, float]:
    return {
        tier: last.total(f"{_P}hit_tokens_total", component="full", tier=tier, **_ONE)
        for tier in TIERS
    }


def _computed_ever(last: Metrics) -> dict[str, float]:
    found = last.by("cause", f"{_P}computed_tokens_total", **_ONE)
    return {cause: found.get(cause, 0.0) for cause in CAUSES}


def _hit_changes(seen: Observed, tier: str) -> list[float]:
    return seen.changes(f"{_P}hit_tokens_total", component="full", tier=tier, **_ONE)


def _computed_changes(seen: Observed, cause: str) -> list[float]:
    return seen.changes(f"{_P}computed_tokens_total", cause=cause, **_ONE)


def _share(part: float, whole: float) -> str:
    return units.share(part / whole) if whole else "no prompt"


def _hits(seen: Observed) -> list[str]:
    hits = {tier: _hit_changes(seen, tier) for tier in TIERS}
    computed = [
        sum(parts) for parts in zip(*(_computed_changes(seen, c) for c in CAUSES), strict=True)
    ]
    wholes = [sum(parts) for parts in zip(*hits.values(), computed, strict=True)]
    if not sum(wholes):
        return []
    shares = [
        Series(tier, TIERS[tier], _divided(numbers, wholes)) for tier, numbers in hits.items()
    ]
    rates = [
        Series(f"found: {tier}", TIERS[tier], _divided(numbers, seen.lengths()))
        for tier, numbers in hits.items()
    ]
    rates.append(Series("computed", "c6", _divided(computed, seen.lengths())))
    return [
        columns(
            "Hit rate over time",
            "Share of prompt tokens that were not computed, by the tier where they were found. "
            "Requests count when they end.",
            seen.times,
            shares,
            (_TIME, Axis("share", units.share, 1.0)),
        ),
        columns(
            "Prompt tokens a second",
            "All tokens of prompts, found or computed.",
            seen.times,
            rates,
            (_TIME, Axis("tokens a second", units.count)),
        ),
    ]


def _divided(parts: list[float], wholes: list[float]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


def _recompute(seen: Observed) -> str:
    now, ever = _computed(seen), _computed_ever(seen.last)
    return bars(
        "Computed prompt tokens by cause",
        "; ".join(f"{_named(cause)}: {meaning}" for cause, meaning in CAUSES.items()) + ".",
        [_named(cause) for cause in CAUSES],
        [Series(_NOW, "c1", list(now.values())), Series(_SINCE_START, "c6", list(ever.values()))],
        Axis("cause", units.count),
    )


def _named(label: str) -> str:
    return label.replace("_", " ")


def _occupancy(seen: Observed) -> list[str]:
    if len(seen.times) == 1:
        # one look is an interval without a length
        seen = Observed([0.0, 1.0], [seen.last, seen.last])
        axis = Axis("one look", lambda _: "now")
    else:
        axis = _TIME
    found = []
    kv = [
        Series(f"{name}, {state}", color, seen.values(f"{_P}kv_bytes", tier="device", **labels))
        for name, component, colors in (
            ("full attention", "full", ("c1", "c1 soft")),
            ("windows", "swa", ("c4", "c4 soft")),
        )
        for state, color in zip(("pinned", "evictable"), colors, strict=True)
        if (labels := {"component": component, "state": state})
    ]
    found.append(
        columns(
            "Device",
            "KV that the cache holds on the device, by component; pinned by requests or transfers, "
            "or evictable. The line is the size of the engine's pools.",
            seen.times,
            kv,
            (axis, Axis("bytes", units.size)),
            seen.last.total(f"{_P}device_pool_bytes") or None,
        )
    )
    if f"{_P}host_memory_bytes" in seen.last:
        uses = {
            "full": ("full attention", "c1"),
            "window": ("windows", "c4"),
            "holes": ("holes", "c6"),
        }
        host = [
            Series(name, color, seen.values(f"{_P}host_memory_bytes", use=use))
            for use, (name, color) in uses.items()
        ]
        found.append(
            columns(
                "Host",
                "Host memory by use. The line is all of it.",
                seen.times,
                host,
                (axis, Axis("bytes", units.size)),
                seen.last.total(f"{_P}host_memory_bytes") or None,
            )
        )
    return found


def _retention(last: Metrics) -> list[str]:
    found = []
    bounds, ages = _ages(last)
    if ages:
        found.append(
            curves(
                "Retention curve",
                "Share of evictions at which what went had been unused for at least so long: how "
                "long a tier keeps what nobody asks for.",
                bounds,
                [
                    Series(f"{name} on the {tier}", color, curve)
                    for (component, tier), curve in ages.items()
                    for name, color in [_of_component(component, tier)]
                ],
                (Axis("time without a use", units.seconds), Axis("share", units.share, 1.0)),
            )
        )
    returns = last.by("class", f"{_P}retention_returns_ratio", **_ONE)
    if any(returns.values()):
        stay = last.by("class", f"{_P}retention_stay_requests", **_ONE)
        classes = sorted(returns, key=returns.__getitem__, reverse=True)
        found.append(
            bars(
                "Pages that come back",
                "Share of the pages of a class that are used again within 1,000 requests.",
                classes,
                [Series("used again", "c3", [returns[name] for name in classes])],
                Axis("class", units.share),
            )
        )
        found.append(
            bars(
                "How long pages stay",
                "Requests that a page of a class stays without a use, if what is learned decides.",
                classes,
                [Series("requests", "c4", [stay.get(name, 0.0) for name in classes])],
                Axis("class", units.count),
            )
        )
    return found


def _of_component(component: str, tier: str) -> tuple[str, str]:
    names = {"full": "full attention", "swa": "windows"}
    colors = {("full", "device"): "c1", ("swa", "device"): "c4", ("full", "host"): "c2"}
    return names.get(component, component), colors.get((component, tier), "c6")


def _ages(last: Metrics) -> tuple[list[float], Mapping[tuple[str, str], list[float | None]]]:
    """0 and the bounds of the histogram of ages, and for (component, tier) the share that was at
    least so old."""
    name = f"{_P}eviction_age_seconds"
    bounds = sorted(float(le) for le in last.by("le", f"{name}_bucket") if le != "+Inf")
    curves_of: dict[tuple[str, str], list[float | None]] = {}
    for component, tier in itertools.product(("full", "swa"), ("device", "host")):
        labels = {"component": component, "tier": tier}
        whole = last.total(f"{name}_count", **labels)
        younger = last.by("le", f"{name}_bucket", **labels)
        at = {float(le): number for le, number in younger.items()}
        if whole:
            curves_of[component, tier] = [1.0, *(1.0 - at[bound] / whole for bound in bounds)]
    return [0.0, *bounds], curves_of


def _moved(seen: Observed) -> list[str]:
    name = f"{_P}transfer_bytes_sum"
    if name not in seen.last:
        return []
    ever = {way: seen.last.total(name, direction=way) for way in DIRECTIONS}
    now = {way: seen.changes(name, direction=way) for way in DIRECTIONS}
    found = []
    if any(sum(changes) for changes in now.values()):
        found.append(
            columns(
                "Bytes moved over time",
                "What copies and storage have moved, when their jobs ended.",
                seen.times,
                [
                    Series(said, color, _divided(now[way], seen.lengths()))
                    for way, (said, color) in DIRECTIONS.items()
                ],
                (_TIME, Axis("bytes a second", units.speed)),
            )
        )
    found.append(
        bars(
            "Bytes moved",
            "By direction.",
            [said for said, _ in DIRECTIONS.values()],
            [
                Series(_NOW, "c1", [sum(changes) for changes in now.values()]),
                Series(_SINCE_START, "c6", list(ever.values())),
            ],
            Axis("direction", units.size),
        )
    )
    return found


def _refused(seen: Observed) -> list[str]:
    tables = (
        ("Transfers declined", "Not begun, by reason.", "reason", "declined_total"),
        (
            "Tokens that storage had and requests did not get",
            "By reason.",
            "reason",
            "unfulfilled_tokens_total",
        ),
        ("Other events", "Failures, and what was given up.", "event", "cache_events_total"),
    )
    found = []
    for caption, note, label, name in tables:
        ever = seen.last.by(label, f"{_P}{name}", **_ONE)
        if ever:
            now = [seen.change(f"{_P}{name}", **{label: value}, **_ONE) for value in ever]
            series = [Series(_NOW, "c1", now), Series(_SINCE_START, "c6", list(ever.values()))]
            names = [_named(value) for value in ever]
            found.append(bars(caption, note, names, series, Axis(label, units.count)))
    return found
