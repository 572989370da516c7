"""Drafts with DP attention, on real servers: the line of SGLang's own test of its host tier with
MiMo-V2.5, whose three layers draft one behind the other.

The ranks verify and draft in batches of one size, which are padded where a rank has less. Tokens
are those of a server that neither drafts nor caches. What is drafted is that of a server whose hits
are all on the device: each rank has its own, so a conversation stays with its rank.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.server import OURS, STRICT_CHECKS, Server, dp_attention
from launch.traffic import Traffic
from tests.e2e.conftest import COMMON, RANKS, assert_idle_and_alive
from tests.e2e.conversations import Answer, differences, hit_rates
from tests.e2e.drafts import KINDS, LOG, TAKEN, Drafted, drafted_for
from tests.e2e.test_dp_attention import alternate, hold, host_tokens
from tests.e2e.test_draft_tiers import assert_same_drafts
from tests.e2e.test_storage import wait_until_idle
from tests.fixtures.zygote import Zygote

KIND = KINDS["mimo-v2"]
LINE = ("--page-size", "64", "--enable-dp-lm-head")
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "4", "--hicache-mem-layout", "page_first")
TIGHT = ("--max-total-tokens", "1024", *HOST)
ROOM = ("--max-total-tokens", "6144")
# a prompt is computed at once on both kinds of servers: what several layers draft depends on where
# it was cut
SHORT = Traffic(rounds=2, fork=0.0, first=(140, 320), answer=(8, 24))
ONE = dataclasses.replace(SHORT, conversations=4, parallel=2, seed=33)
BOTH = dataclasses.replace(SHORT, conversations=8, rounds=3, seed=31)
IN_TURN = dataclasses.replace(SHORT, conversations=8, parallel=1, seed=7)
"""One request at a time: what is computed beside others differs in its last bit."""


@pytest.fixture(scope="module")
def expected(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Answers of a server that neither drafts nor caches."""
    arguments = [*KIND.without(), *COMMON, *LINE[:2], "--disable-radix-cache"]
    arguments += ["--max-total-tokens", "16384"]
    log = tmp_path_factory.mktemp("plain") / "log"
    with zygote.running(arguments, log, STRICT_CHECKS) as server:
        yield lambda traffic: hold(server, traffic, lambda _: None)


@pytest.fixture(scope="module")
def server(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two DP ranks that draft, with a host each."""
    arguments = [*KIND.arguments(), *COMMON, *LINE, *dp_attention(2), *OURS, *TIGHT]
    log = tmp_path_factory.mktemp("drafts") / "log"
    with zygote.running(arguments, log, {**STRICT_CHECKS, **RANKS}) as server:
        yield server
        assert_idle_and_alive(server)


def test_an_idle_rank_beside_one_that_drafts(server: Server, expected: Callable) -> None:
    """The idle one drafts and verifies as many tokens, of nobody."""
    answers = hold(server, ONE, lambda _: 1)
    assert not differences(answers, expected(ONE))
    assert sum(answer.host_tokens for answer in answers) > 0


@pytest.mark.full
def test_ranks_with_unlike_batches(server: Server, expected: Callable) -> None:
    answers = hold(server, BOTH, alternate)
    assert not differences(answers, expected(BOTH))
    assert host_tokens(answers, 0) > 0
    assert host_tokens(answers, 1) > 0


def drafted(zygote: Zygote, folder: Path, *options: str) -> Drafted:
    """Conversations in turn, every other one on the other rank."""
    folder.mkdir()
    arguments = [*KIND.arguments(), *COMMON, *LINE, *dp_attention(2), *OURS, *options]
    variables = {**STRICT_CHECKS, **RANKS, LOG: str(folder / "proposals")}
    with zygote.running(arguments, folder / "log", variables) as server:
        # a rank may still compute for the check of its health
        wait_until_idle(server)
        answers = hold(server, IN_TURN, alternate)
        assert_idle_and_alive(server)
    return drafted_for(answers, folder / "proposals")


def assert_host_drafts_as_device(zygote: Zygote, folder: Path) -> list[Answer]:
    """At every step of every request; returns the answers."""
    host = drafted(zygote, folder / "host", *TIGHT)
    device = drafted(zygote, folder / "device", *ROOM)
    assert hit_rates(host.answers)["host_share"] > 0
    assert not differences(host.answers, device.answers)
    assert_same_drafts(host, device)
    return host.answers


@pytest.mark.full
def test_drafts_after_hits_on_the_hosts(zygote: Zygote, tmp_path: Path, expected: Callable) -> None:
    answers = assert_host_drafts_as_device(zygote, tmp_path)
    assert not differences(answers, expected(IN_TURN))


@pytest.mark.full
def test_drafts_behind_taken_ones(tmp_path: Path) -> None:
    """Two of three are taken, whatever the target says; answers are the drafts'."""
    with contextlib.closing(Zygote(**TAKEN)) as zygote:
        assert_host_drafts_as_device(zygote, tmp_path)
