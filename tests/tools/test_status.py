"""One screen of a server's metrics, from stand-ins of a server."""

from collections.abc import Callable

import pytest

from sglang_ext.tools import status
from sglang_ext.tools.status import Metrics, screen

TEXT = """
# HELP sglang_ext:kv_bytes KV that is in a tier.
# TYPE sglang_ext:kv_bytes gauge
sglang_ext:kv_bytes{component="full",model_name="a b",state="pinned",tier="device"} 100e6
sglang_ext:kv_bytes{component="full",state="evictable",tier="device"} 20e6
sglang_ext:kv_bytes{component="swa",state="evictable",tier="device"} 40e6
sglang_ext:kv_bytes{component="full",state="evictable",tier="host"} 700e6
sglang_ext:kv_bytes{component="swa",state="evictable",tier="host"} 50e6
sglang_ext:host_memory_bytes{use="full"} 6e+09
sglang_ext:host_memory_bytes{use="window"} 1e+09
sglang_ext:host_memory_bytes{use="holes"} 0.0
sglang_ext:host_memory_bytes{use="free"} 3e+09
sglang_ext:kv_tokens_total{component="full",event="backed_up",tp_rank="0"} 900.0
sglang_ext:kv_tokens_total{component="full",event="backed_up",tp_rank="1"} 1.0
sglang_ext:kv_tokens_total{component="swa",event="loaded"} 12.0
sglang_ext:kv_tokens_total{component="full",event="persisted"} 5.0
sglang_ext:kv_tokens_total{component="swa",event="persisted"} 3.0
sglang_ext:cache_events_total{event="failed_transfers"} 2.0
sglang_ext:storage_files_total{event="damaged"} 3.0
sglang_ext:retention_learned{} 1.0
sglang_ext:retention_price_uses 0.0125
sglang_ext:host_sampling 0.0
sglang_ext:recompute_max_tokens 4096.0
sglang:prompt_tokens_total{model_name="a\\"b"} 10000.0
sglang:cached_tokens_total{cache_source="device"} 4000.0
sglang:cached_tokens_total{cache_source="host"} 1000.0
sglang:cached_tokens_total{cache_source="total"} 5000.0
sglang:num_running_reqs 3.0
sglang:num_queue_reqs 1.0
"""
LATER = TEXT.replace("} 10000.0", "} 12000.0").replace('"host"} 1000.0', '"host"} 2000.0')


def rows(lines: list[str]) -> dict[str, str]:
    return {line[:20].strip(): line[20:].strip() for line in lines}


def test_a_screen_has_tiers_rates_retention_and_storage() -> None:
    said = rows(screen(Metrics(TEXT)))
    assert said["requests"] == "3 running, 1 waiting"
    assert said["found, since start"] == (
        "0.500 of 10,000 prompt tokens (device 0.400, host 0.100, storage 0.000)"
    )
    assert said["device"].startswith("120.0 MB of full attention, 40.0 of windows")
    assert (
        "7.00 GB of 10.00 GB (full 6.00 GB, window 1.00 GB, holes 0.00 kB, free 3.00 GB)"
        in said["host"]
    )
    assert (
        "901 tokens and 0 of windows to the host, 0 tokens and 12 of windows back" in said["copied"]
    )
    assert said["retention"] == "what is expected back stays, price 0.0125 uses a request"
    assert said["storage"] == "5 tokens written, 0 read; files: 3 damaged"
    assert said["most recomputed"].startswith("4,096 tokens")
    assert said["trouble"] == "failed transfers 2"


def test_the_next_screen_has_what_happened_since() -> None:
    said = rows(screen(Metrics(LATER), Metrics(TEXT), 4.0))
    assert said["found, last 4 s"] == (
        "0.500 of 2,000 prompt tokens, 500 a second (device 0.000, host 0.500, storage 0.000)"
    )
    assert rows(screen(Metrics(TEXT), Metrics(TEXT), 4.0))["found, last 4 s"] == "no prompt"


def test_once_is_one_screen(tell: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--url", tell(TEXT), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "0.500 of 10,000 prompt tokens" in printed
    assert "\x1b" not in printed


def test_it_is_drawn_anew_until_the_server_has_gone(
    tell: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main(["--url", tell(TEXT, LATER, "nothing"), "--every", "0.01"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\x1b[H\x1b[J") == 2
    assert "0.500 of 2,000 prompt tokens" in printed.out
    assert "--enable-metrics" in printed.err


@pytest.mark.parametrize(("code", "text"), [(404, "no"), (200, "sglang:num_running_reqs 3.0")])
def test_a_server_without_our_metrics_is_told_what_to_do(
    tell: Callable[..., str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main(["--url", tell(text, code=code), "--once"]) == 1
    said = capsys.readouterr().err
    assert "--enable-metrics" in said
    assert said.count("\n") == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--url", "http://127.0.0.1:9", "--once"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
