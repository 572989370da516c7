"""Options that change how requests are batched, ordered, preempted or chunked, many on one server:
every token is that of a server without a cache."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.server import OURS, Server
from launch.traffic import Traffic, generate
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import Answer, differences, rounds
from tests.e2e.test_storage import stored_in
from tests.e2e.test_token_exact import SHORT

HOST = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "3")
SERVERS = {
    "mixed chunks": (
        *(*HOST, "--enable-mixed-chunk", "--chunked-prefill-size", "64", "--page-size", "16"),
        *("--schedule-policy", "lpm", "--prefill-max-requests", "2", "--max-prefill-tokens", "512"),
        *("--stream-interval", "4", "--schedule-conservativeness", "0.3"),
        *("--num-continuous-decode-steps", "4", "--scheduler-recv-interval", "3"),
        *("--abort-on-priority-when-disabled", "--batch-notify-size", "4"),
    ),
    "priorities": (
        *(*HOST, "--enable-priority-scheduling", "--schedule-policy", "lof", "--page-size", "64"),
        *("--priority-scheduling-preemption-threshold", "5", "--retraction-policy", "priority"),
        *("--schedule-low-priority-values-first", "--default-priority-value", "7"),
        *("--hicache-write-policy", "write_back", "--prefill-decode-interval", "3"),
        *("--prefill-decode-interval-min-bs", "2", "--max-running-requests", "3"),
    ),
    "delays": (
        *("--schedule-policy", "shortest-prefill-first", "--page-size", "16"),
        *("--chunked-prefill-size", "128", "--enable-dynamic-chunking"),
        *("--enable-prefill-delayer", "--prefill-delayer-queue-min-ratio", "0.4"),
        *("--prefill-delayer-max-delay-ms", "50", "--prefill-delayer-max-delay-passes", "3"),
        *("--prefill-delayer-token-usage-low-watermark", "0.2", "--max-queued-requests", "64"),
        *("--hicache-storage-prefetch-retry-poll-interval", "2"),
    ),
    "no overlap": (
        *(*HOST, "--disable-overlap-schedule", "--schedule-policy", "hrrn", "--page-size", "1"),
        *("--min-free-slots-delay", "2", "--chunked-prefill-size", "-1"),
        *("--swa-full-tokens-ratio", "0.5", "--incremental-streaming-output"),
    ),
    "no preemption": (
        *(*HOST, "--enable-priority-scheduling", "--disable-priority-preemption"),
        *("--page-size", "16", "--max-running-requests", "3", "--sleep-on-idle"),
    ),
    "by routing key": (*HOST, "--schedule-policy", "routing-key", "--page-size", "16"),
    "random": (*HOST, "--schedule-policy", "random", "--page-size", "64"),
}

FULL = ("no preemption", "by routing key", "random")
"""Another order of those that wait, as `lpm`, `lof`, `hrrn` and priorities are; nothing else is
unlike."""


def fields_of(name: str, number: int) -> dict[str, Any]:
    """What a request of this conversation says beside its prompt."""
    if "priorit" in name or "preemption" in name:
        return {"priority": number % 3 * 20}
    return {"routing_key": f"user-{number % 3}"} if "routing" in name else {}


def all_at_once(server: Server, traffic: Traffic, name: str) -> list[Answer]:
    """All conversations at the same time."""
    with ThreadPoolExecutor(traffic.conversations) as pool:
        held = pool.map(
            lambda number: list(rounds(server, traffic, number, **fields_of(name, number))),
            range(traffic.conversations),
        )
        return [answer for answers in held for answer in answers]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name in FULL else []) for name in SERVERS],
)
def test_every_token_is_right_with(name: str, serve, reference, tmp_path: Path) -> None:  # noqa: ANN001
    options = SERVERS[name]
    if name == "delays":
        options = (*stored_in(tmp_path), *options)
    with serve(128, *options, tokens=2048) as server:
        answers = all_at_once(server, SHORT, name)
        if name == "mixed chunks":
            with pytest.raises(httpx.HTTPStatusError):
                generate(server, [5, 6, 7], 1, priority=3)
        assert_idle_and_alive(server)
    assert not differences(answers, reference(128, SHORT))
    assert sum(a.device_tokens + a.host_tokens for a in answers) > 0
    if name == "priorities":
        assert any(a.retractions for a in answers), "no request was preempted"
