"""DP attention on real servers: two DP ranks, each with its own requests and its own cache."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from launch.bench.metrics import metric, settled
from launch.server import Server, dp_attention
from launch.traffic import Traffic, generate
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.conversations import Answer, differences, rounds
from tests.e2e.test_operations import LONG, Running, prompt, refused
from tests.e2e.test_storage import (
    cached,
    flush,
    pages_in,
    stop_gracefully,
    stored_in,
    wait_until_idle,
    when_idle,
)

PAGE = ("--page-size", "16")
BOTH = Traffic(conversations=10, rounds=3, fork=0.0, seed=31)
"""More tokens on each rank than its device has."""
ONE = dataclasses.replace(BOTH, conversations=6, seed=32)
AGAIN = (8, 9)
"""Conversations that go on after a restart, each on the other rank."""


def hold(server: Server, traffic: Traffic, rank_of: Callable[[int], int | None]) -> list[Answer]:
    """All conversations, each on a rank of its own; None leaves it to the engine."""
    numbers = range(traffic.conversations)
    running = [rounds(server, traffic, n, routed_dp_rank=rank_of(n)) for n in numbers]
    with ThreadPoolExecutor(traffic.parallel) as pool:
        return [answer for _ in range(traffic.rounds) for answer in pool.map(next, running)]


def alternate(number: int) -> int:
    """Every other conversation on the other rank."""
    return number % 2


class Expected:
    """What a server without a prefix cache answers, on one rank: tokens do not depend on the layout
    of ranks.

    Attributes:
        to: answers to conversations.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.to = functools.cache(lambda traffic: hold(server, traffic, lambda _: None))

    @functools.cached_property
    def long(self) -> list[int]:
        """At length to prompt 1."""
        tokens: list[int] = generate(self._server, prompt(1), LONG)["output_ids"]
        return tokens


@pytest.fixture(scope="module")
def expected(serve) -> Iterator[Expected]:  # noqa: ANN001
    """A server that waits for whatever is asked of it."""
    with serve(128, *PAGE, "--disable-radix-cache", tokens=8192) as server:
        yield Expected(server)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one directory of all ranks."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def server(serve, pages: Path) -> Iterator[Server]:  # noqa: ANN001
    """Two DP ranks with host memory and storage. With overlapped scheduling a rank without
    requests is not idle, to the engine, beside one that has some; here it is."""
    options = [*stored_in(pages), *dp_attention(2), *PAGE, "--enable-metrics"]
    options += ["--disable-overlap-schedule", "--admin-api-key", "secret"]
    with serve(128, *options, tokens=2048, **RANKS) as server:
        server.key = "secret"
        yield server
        assert_idle_and_alive(server)
        stop_gracefully(server)


def host_tokens(answers: list[Answer], rank: int) -> int:
    """Tokens that came from the host of one rank, of conversations that alternate."""
    return sum(a.host_tokens for a in answers if alternate(a.conversation) == rank)


def test_both_ranks_hit_their_hosts(server: Server, expected: Expected) -> None:
    answers = hold(server, BOTH, alternate)
    assert not differences(answers, expected.to(BOTH))
    assert host_tokens(answers, 0) > 0
    assert host_tokens(answers, 1) > 0


@pytest.mark.full
def test_an_idle_rank_beside_one_that_is_loaded(server: Server, expected: Expected) -> None:
    """The idle one holds up nobody, and keeps what it has."""
    wait_until_idle(server)
    before = pages_of_rank_1(server)
    answers = hold(server, ONE, lambda _: 0)
    assert not differences(answers, expected.to(ONE))
    assert sum(a.host_tokens for a in answers) > 0
    assert pages_of_rank_1(server) == before
    wait_until_idle(server)


def pages_of_rank_1(server: Server) -> float:
    """On its device and its host."""
    pages = metric(settled(server), "sglang_ext:kv_bytes", 'dp_rank="1"')
    assert pages > 0
    return pages


def last_prompt(traffic: Traffic, number: int, answers: list[Answer]) -> tuple[list[int], Answer]:
    """(the last prompt of a conversation, its answer)."""
    session = traffic.session(number)
    turn = next(session)
    own = sorted((a for a in answers if a.conversation == number), key=lambda a: a.round)
    for answer in own[:-1]:
        turn = session.send(np.array(answer.output, dtype=np.int64))
    return turn.prompt.tolist(), own[-1]


def test_what_one_rank_has_stored_the_other_reads(
    server: Server, expected: Expected, pages: Path
) -> None:
    """Each DP rank has whole pages, so both name them alike."""
    flush(server)  # all that is promised to storage is there
    tokens, known = last_prompt(BOTH, 0, expected.to(BOTH))
    result = generate(server, tokens, len(known.output), routed_dp_rank=1 - alternate(0))
    assert result["output_ids"] == list(known.output)
    assert cached(result)["storage"] >= known.prompt_tokens // 2
    assert {path.parents[1].name for path in pages_in(pages)} == {"0-of-1"}


def from_storage(server: Server, expected: Expected, *ranks: int) -> list[bool]:
    """Whether each rank finds prompt 1 in storage; the tokens are right, and device and host are
    empty."""
    found = []
    for rank in ranks:
        result = generate(server, prompt(1), 8, routed_dp_rank=rank)
        assert result["output_ids"] == expected.long[:8]
        tiers = cached(result)
        assert tiers["device"] == tiers["host"] == 0
        found.append(tiers["storage"] > 0)
    return found


@pytest.mark.full
def test_a_flush_is_said_to_be_done_when_all_ranks_have(server: Server, expected: Expected) -> None:
    """A rank that is idle flushes at once, one that is not refuses."""
    running = Running(server, 1, routed_dp_rank=1)
    refused(lambda: server.post("/flush_cache?timeout=0.1", {}))
    assert running.result() == expected.long
    flush(server)
    assert from_storage(server, expected, 0, 1) == [True, True]


@pytest.mark.full
def test_storage_is_detached_from_all_ranks_or_from_none(
    server: Server, expected: Expected, pages: Path
) -> None:
    """Nor is it attached to one alone."""
    detach = ("/hicache/storage-backend", {})
    running = Running(server, 1, routed_dp_rank=1)
    assert "not idle" in refused(lambda: server.post(*detach, method="DELETE"))
    assert running.result() == expected.long
    flush(server)
    assert from_storage(server, expected, 0) == [True]
    when_idle(lambda: server.post(*detach, method="DELETE"))
    running = Running(server, 1, routed_dp_rank=1)
    assert "not idle" in refused(lambda: attach(server, pages))
    assert running.result() == expected.long
    flush(server)
    assert from_storage(server, expected, 0) == [False]
    when_idle(lambda: attach(server, pages))
    flush(server)
    assert from_storage(server, expected, 0, 1) == [True, True]


def attach(server: Server, directory: Path) -> None:
    """Attach a directory at once."""
    settings = {"file_storage_path": str(directory), "prefetch_threshold": 16}
    body = {
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config_json": json.dumps(settings),
    }
    server.post("/hicache/storage-backend", body, method="PUT")


@pytest.mark.full
def test_memory_is_released_when_all_ranks_are_idle(server: Server, expected: Expected) -> None:
    """The ranks wait for each other in it: none begins before the others can. The answer ends
    well within the time for which a release waits, on a busy machine too."""
    running = Running(server, 1, tokens=20, routed_dp_rank=1)
    server.post("/release_memory_occupation", {})
    assert running.result() == expected.long[:20]
    server.post("/resume_memory_occupation", {})
    for rank in (0, 1):
        result = generate(server, prompt(1), 8, routed_dp_rank=rank)
        assert result["output_ids"] == expected.long[:8]


@pytest.mark.full
def test_a_restart_hits_what_the_other_rank_has_written(
    serve,  # noqa: ANN001
    expected: Expected,
    tmp_path: Path,
) -> None:
    """With the vocabulary whole on each rank, and the same tokens."""
    options = [*stored_in(tmp_path), *PAGE, "--enable-dp-lm-head"]
    with serve(128, *options, *dp_attention(2), tokens=2048, **RANKS) as server:
        answers = hold(server, BOTH, alternate)
        assert not differences(answers, expected.to(BOTH))
        assert host_tokens(answers, 0) > 0
        assert host_tokens(answers, 1) > 0
        stop_gracefully(server)
    with serve(128, *options, *dp_attention(2), tokens=2048, **RANKS) as server:
        for number in AGAIN:
            tokens, known = last_prompt(BOTH, number, expected.to(BOTH))
            other = 1 - alternate(number)
            result = generate(server, tokens, len(known.output), routed_dp_rank=other)
            assert result["output_ids"] == list(known.output)
            assert cached(result)["storage"] >= known.prompt_tokens // 2
        assert_idle_and_alive(server)
