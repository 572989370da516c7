"""What a server exports, at two times."""

_HITS = 'sglang_ext:hit_tokens_total{component="full",tp_rank="0",tier='
_COMPUTED = 'sglang_ext:computed_tokens_total{tp_rank="0",cause='
_AGES = 'sglang_ext:eviction_age_seconds_bucket{component="full",tier="device",le='
_KV = "sglang_ext:kv_bytes{tp_rank="


def text(
    device: int = 1000, host: int = 1000, new: int = 1000, backup: float = 3e6, full: int = 1
) -> str:
    """Of ``/metrics``.

    Args:
        device: tokens found there, and so on.
        new: tokens computed.
        backup: bytes copied to the host.
        full: transfers declined for a full host.
    """
    return f"""
{_HITS}"device"}} {device}
{_HITS}"host"}} {host}
{_HITS.replace('"0"', '"1"')}"host"}} {host}
{_HITS.replace('tp_rank="0"', 'pp_rank="1",tp_rank="0"')}"host"}} {host}
{_COMPUTED.replace('tp_rank="0"', 'pp_rank="1",tp_rank="0"')}"new"}} {new}
{_COMPUTED}"new"}} {new}
{_COMPUTED}"window_lost"}} 7
sglang_ext:transfer_bytes_sum{{direction="backup",tp_rank="0"}} {backup}
sglang_ext:transfer_bytes_sum{{direction="load"}} 1e6
sglang_ext:declined_total{{reason="host_full",tp_rank="0"}} {full}
sglang_ext:cache_events_total{{event="failed_transfers",tp_rank="0"}} 0
{_KV}"0",component="full",state="pinned",tier="device"}} 100e6
{_KV}"0",component="full",state="evictable",tier="device"}} 20e6
{_KV}"0",component="swa",state="pinned",tier="device"}} 0
{_KV}"0",component="swa",state="evictable",tier="device"}} 40e6
sglang_ext:device_pool_bytes{{component="full"}} 150e6
sglang_ext:device_pool_bytes{{component="swa"}} 50e6
sglang_ext:host_memory_bytes{{use="full"}} 6e9
sglang_ext:host_memory_bytes{{use="window"}} 1e9
sglang_ext:host_memory_bytes{{use="holes"}} 0
sglang_ext:host_memory_bytes{{use="free"}} 3e9
{_AGES}"1.0"}} 1
{_AGES}"60.0"}} 3
{_AGES}"+Inf"}} 4
sglang_ext:eviction_age_seconds_count{{component="full",tier="device"}} 4
sglang_ext:retention_returns_ratio{{class="first",tp_rank="0"}} 0.125
sglang_ext:retention_returns_ratio{{class="turn 2",tp_rank="0"}} 0.5
sglang_ext:retention_stay_requests{{class="first",tp_rank="0"}} 10
sglang_ext:retention_stay_requests{{class="turn 2",tp_rank="0"}} 900
"""


def later() -> str:
    """400 tokens of prompts later, 300 of which were found."""
    return text(device=1100, host=1200, new=1100, backup=5e6, full=4)
