"""Write docs/metrics.md from the definitions of the metrics.

python -m launch.monitoring.reference docs/metrics.md
"""

from launch.configuration import table, write
from sglang_ext.adapter.metric_definitions import METRICS, PREFIX, Definition

_INTRODUCTION = """\
# Metrics

`python -m launch.monitoring.reference docs/metrics.md` writes this page from
`sglang_ext/adapter/metric_definitions.py`. Edit that.

With `--enable-metrics` the engine's `/metrics` has these next to its own. Every metric has the
labels of the engine's cache (`cache_type`, `tp_rank`, `pp_rank`, `dp_rank`) and those of
`--extra-metric-labels`. Each rank counts for itself. Ranks of one request hold the same pages, so
tokens are those of one `tp_rank`, and bytes are the sum over ranks.

All values of all labels are there from the start, at 0; `namespace_bytes` with the first quota, and
some of the engine's own metrics with their first use. What has changed is published a few times a
second, a little of it in each step. An idle server with `--sleep-on-idle` takes up to a second.

"""

_FED = {
    "cached_tokens_total{cache_source}": (
        "the engine itself, from what a request was given; the same tokens as `hit_tokens_total` "
        "of `full`"
    ),
    "evicted_tokens_total": "evictions from the device",
    "eviction_duration_seconds": "how long they take",
    "hicache_backup_tokens_total{pool}": "copies to the host",
    "hicache_backup_bytes_total": "the same in bytes, of this rank",
    "hicache_backup_duration_seconds": "how long the copies of a job take",
    "load_back_tokens_total{pool}": "copies from the host",
    "load_back_bytes_total": "the same in bytes, of this rank",
    "load_back_duration_seconds": "how long the copies of a job take",
    "hicache_dropped_tokens_total{reason, pool}": "pages that left the device without a copy",
    "hicache_host_used_tokens": "both components, as tokens of full attention",
    "hicache_host_total_tokens": "the same of all host memory",
    "prefetched_tokens_total": "read from storage",
    "backuped_tokens_total": "written to storage",
    "storage_prefetch_hit_tokens_total": "found in storage for requests that wait",
    "storage_prefetch_unfulfilled_tokens_total{reason}": "those of them that a request did not get",
    "prefetch_pgs": "pages of a batch that was read",
    "backup_pgs": "pages of a batch that was written",
    "prefetch_bandwidth": "of a batch that was read, GB/s",
    "backup_bandwidth": "of a batch that was written, GB/s",
}
"""Metrics of the engine, without their prefix: what the cache tells them."""

_ENGINE = """\

## Metrics of the engine that the cache feeds

"""

_MORE = """\

## Dashboard and alerts

- [dashboard.json](../launch/monitoring/dashboard.json) is for Grafana: Dashboards, New, Import. It
  asks for the Prometheus data source. `python -m launch.monitoring.dashboard
  launch/monitoring/dashboard.json` writes it.
- [alerts.yaml](../launch/monitoring/alerts.yaml) is for Prometheus: name it in `rule_files`. Each
  alert says what to do.
- [promtool.sh](../launch/monitoring/promtool.sh) gets `promtool` from Debian's package, to check
  rules that you have changed.

Tests hold every query against the metrics of a running server.

## What it costs

A step looks at a clock. A few times a second some steps in a row publish what has changed: each
looks at one kind of it, or sets two values. `python -m launch.bench.publish` measures them.
"""


def _labels(definition: Definition) -> str:
    return "; ".join(
        f"`{label}`" + (": " + ", ".join(f"`{value}`" for value in values) if values else "")
        for label, values in definition.labels.items()
    )


def page() -> str:
    """The text of docs/metrics.md."""
    rows = (
        (f"`{PREFIX}{d.name}`", d.kind.value, _labels(d), d.where.value, d.text) for d in METRICS
    )
    metrics = table(("metric", "type", "labels", "servers", "meaning"), rows)
    fed = table(
        ("metric", "what it is told"), ((f"`sglang:{n}`", what) for n, what in _FED.items())
    )
    return _INTRODUCTION + metrics + _ENGINE + fed + _MORE


def main() -> None:
    """Command line."""
    write(page, __doc__.splitlines()[0])


if __name__ == "__main__":
    main()
