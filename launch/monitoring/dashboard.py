"""Write the Grafana dashboard.

python -m launch.monitoring.dashboard launch/monitoring/dashboard.json
"""

import dataclasses
import json
from typing import Any

from sglang_ext.arguments import Parser, output_file

_RATE = "[$__rate_interval]"
_WIDTH, _HEIGHT = 8, 8
_COLUMNS = 24 // _WIDTH
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A graph.

    Attributes:
        unit: as Grafana names it.
        queries: (expression, legend) of each line.
        stacked: the lines are parts of a whole.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str = ""
    stacked: bool = False


def _by(labels: str, metric: str, selector: str = "") -> str:
    """Rate of a counter, summed by labels."""
    return f"sum by ({labels}) (rate({metric}{selector}{_RATE}))"


def _quantile(share: float, histogram: str, labels: str, selector: str = "") -> str:
    by = f"{labels}, le" if labels else "le"
    return f"histogram_quantile({share:g}, {_by(by, histogram + '_bucket', selector)})"


_HITS = "sglang_ext:hit_tokens_total"
_FULL = '{component="full", tp_rank="0"}'
_COMPUTED = "sglang_ext:computed_tokens_total"
_ONE = '{tp_rank="0"}'
_FOUND = f"sum(rate({_HITS}{_FULL}{_RATE}))"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Hits": (
        Panel(
            "Share of prompt tokens that were cached",
            "percentunit",
            (
                (f"{_FOUND} / ({_FOUND} + sum(rate({_COMPUTED}{_ONE}{_RATE})))", "all tiers"),
                (
                    f"{_by('tier', _HITS, _FULL)} / ignoring(tier) group_left() "
                    f"({_FOUND} + sum(rate({_COMPUTED}{_ONE}{_RATE})))",
                    "{{tier}}",
                ),
            ),
        ),
        Panel(
            "Prompt tokens, by where they come from",
            "short",
            (
                (_by("tier", _HITS, _FULL), "found: {{tier}}"),
                (_by("cause", _COMPUTED, _ONE), "computed: {{cause}}"),
            ),
            "New ones cannot be helped. Evicted: more host memory. Not copied: see transfers. "
            "Window lost: more windows (SGLANG_EXT_CHECKPOINT_TOKENS), or more host memory.",
            stacked=True,
        ),
        Panel(
            "Window tokens, by where they were found",
            "short",
            ((_by("tier", _HITS, '{component="swa", tp_rank="0"}'), "{{tier}}"),),
            stacked=True,
        ),
        Panel(
            "Recompute for want of a window",
            "short",
            (
                ("max(sglang_ext:recompute_max_tokens)", "largest, 10 minutes"),
                ("max(sglang_ext:recompute_bound_tokens)", "bound"),
                (_quantile(0.95, "sglang_ext:recompute_tokens", ""), "95 % of requests"),
            ),
        ),
    ),
    "Memory": (
        Panel(
            "Device, share that is cached",
            "percentunit",
            (
                (
                    'sum by (component) (sglang_ext:kv_bytes{tier="device"}) '
                    "/ sum by (component) (sglang_ext:device_pool_bytes)",
                    "{{component}}",
                ),
            ),
        ),
        Panel(
            "KV, evictable and pinned",
            "bytes",
            (
                (
                    "sum by (tier, component, state) (sglang_ext:kv_bytes)",
                    "{{tier}} {{component}} {{state}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Host memory by use",
            "bytes",
            (("sum by (use) (sglang_ext:host_memory_bytes)", "{{use}}"),),
            stacked=True,
        ),
        Panel(
            "Age of what is evicted, median",
            "s",
            (
                (
                    _quantile(0.5, "sglang_ext:eviction_age_seconds", "component, tier"),
                    "{{component}} {{tier}}",
                ),
            ),
            "How long a tier keeps what nobody uses. Shorter than the time between two turns of a "
            "conversation: the tier is too small for it.",
        ),
        Panel(
            "KV that comes and goes",
            "short",
            (
                (
                    _by("component, event", "sglang_ext:kv_tokens_total", _ONE),
                    "{{component}} {{event}}",
                ),
            ),
        ),
        Panel(
            "Device evictions of the engine",
            "short",
            (
                (_by("", "sglang:evicted_tokens_total", _ONE), "tokens"),
                (_by("reason", "sglang:hicache_dropped_tokens_total", _ONE), "lost: {{reason}}"),
            ),
        ),
    ),
    "Transfers": (
        Panel(
            "Bytes",
            "Bps",
            ((_by("direction", "sglang_ext:transfer_bytes_sum"), "{{direction}}"),),
        ),
        Panel(
            "Speed of copies while they run",
            "Bps",
            (
                (
                    f"{_by('direction', 'sglang_ext:transfer_bytes_sum')} "
                    f"/ {_by('direction', 'sglang_ext:transfer_seconds_sum')}",
                    "{{direction}}",
                ),
            ),
        ),
        Panel(
            "From decision to end, 95 %",
            "s",
            (
                (
                    _quantile(0.95, "sglang_ext:transfer_lag_seconds", "direction"),
                    "{{direction}}",
                ),
            ),
            "Backups that are far behind are lost to eviction. A load is what a request waits for.",
        ),
        Panel(
            "In flight",
            "short",
            (("sum by (direction) (sglang_ext:transfers_in_flight)", "{{direction}}"),),
        ),
        Panel(
            "Pinned by operators",
            "short",
            (("sum by (tier) (sglang_ext:pinned_tokens)", "{{tier}}"),),
            "Tokens of pinned prompts, and how many of them are on the device too.",
        ),
        Panel(
            "Namespaces with a quota",
            "bytes",
            (
                (
                    "sum by (extra_key, cache_salt, state) (sglang_ext:namespace_bytes)",
                    "{{extra_key}} {{cache_salt}} {{state}}",
                ),
            ),
            "What each has of the host, and may have.",
        ),
        Panel(
            "Transfers that were not begun",
            "short",
            ((_by("reason", "sglang_ext:declined_total", _ONE), "{{reason}}"),),
        ),
        Panel(
            "Failures and other events",
            "short",
            ((_by("event", "sglang_ext:cache_events_total", _ONE), "{{event}}"),),
        ),
    ),
    "Storage": (
        Panel(
            "Wait of requests, 95 %",
            "s",
            ((_quantile(0.95, "sglang_ext:storage_wait_seconds", ""), "storage"),),
        ),
        Panel(
            "Batches",
            "short",
            ((_by("kind, result", "sglang_ext:storage_operations_total"), "{{kind}} {{result}}"),),
        ),
        Panel(
            "Tokens that requests did not get",
            "short",
            ((_by("reason", "sglang_ext:unfulfilled_tokens_total", _ONE), "{{reason}}"),),
        ),
        Panel(
            "Files",
            "short",
            ((_by("event", "sglang_ext:storage_files_total"), "{{event}}"),),
        ),
    ),
    "Who stays": (
        Panel(
            "How long pages stay without a use, in requests",
            "short",
            (("max by (class) (sglang_ext:retention_stay_requests)", "{{class}}"),),
        ),
        Panel(
            "Pages that are used again within 1,000 requests",
            "percentunit",
            (("max by (class) (sglang_ext:retention_returns_ratio)", "{{class}}"),),
        ),
        Panel(
            "Who decides",
            "short",
            (
                ("max(sglang_ext:retention_learned)", "learned"),
                ("max(sglang_ext:host_sampling)", "host is only sampled"),
                ("max(sglang_ext:retention_price_uses)", "price of room, uses a request"),
            ),
        ),
    ),
}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom = {"fillOpacity": 10, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": expr, "legendFormat": name}
            for n, (expr, name) in enumerate(panel.queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place})
        y += 1
        for n, panel in enumerate(row):
            x = n % _COLUMNS * _WIDTH
            panels.append(_panel(panel, len(panels) + 1, x, y + n // _COLUMNS * _HEIGHT))
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "sglang-ext",
        "title": "sglang-ext: prefix cache",
        "tags": ["sglang"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=output_file)
    parser.parse_args().file.write_text(text())


if __name__ == "__main__":
    main()
