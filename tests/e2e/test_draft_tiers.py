"""Drafts after hits on the host and in storage, on real servers.

A target takes no wrong token, so a lost KV of drafts costs nothing but speed, and no error tells of
it. So what is drafted is compared, at every step of every request, with a server whose hits are all
on the device, and tokens with one that drafts nothing and caches nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.server import OURS, STRICT_CHECKS
from launch.traffic import Traffic
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import Answer, Conversations, converse, differences, hit_rates
from tests.e2e.drafts import KINDS, LOG, Drafted, compare, drafted_for
from tests.e2e.test_storage import stop_gracefully, stored_in
from tests.fixtures.zygote import Zygote

# one request at a time: what is computed beside others differs in its last bit
TRAFFIC = Traffic(conversations=4, rounds=3, fork=0.0, parallel=1, seed=7)
ROOM = ("--max-total-tokens", "6144")
TIGHT = ("--max-total-tokens", "1536")
HOST = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
FEW = ("eagle3",)
"""Beside the pages of full attention; others are packed into the windows' pages."""
CLOSE = 0.02
STORED = ("mimo-v2", "eagle3", "standalone", "step-3.5", "gemma-4")
"""The last one has no KV of its own: its drafts read what the model has stored."""


class Drafts:
    """Servers of one kind of drafts, and the requests that they get one after another."""

    def __init__(self, zygote: Zygote, folder: Path, name: str, traffic: Traffic) -> None:
        self.zygote, self.folder, self.kind = zygote, folder, KINDS[name]
        self.traffic, self.held = traffic, Conversations(traffic)

    def without(self, page: int) -> list[Answer]:
        """Of a server that neither drafts nor caches."""
        options = [*COMMON, *ROOM, "--page-size", str(page), "--disable-radix-cache"]
        arguments = [*self.kind.without(), *options]
        with self.zygote.running(arguments, self.folder / "plain.log", STRICT_CHECKS) as server:
            return converse(server, self.traffic)

    def draft(self, name: str, rounds: int, page: int, *options: str) -> Drafted:
        """The next rounds with another server."""
        folder = self.folder / name
        folder.mkdir()
        arguments = [*self.kind.arguments(), *COMMON, "--page-size", str(page), *OURS, *options]
        variables = {**STRICT_CHECKS, LOG: str(folder / "proposals")}
        with self.zygote.running(arguments, folder / "log", variables) as server:
            answers = self.held.hold(server, rounds)
            assert_idle_and_alive(server)
            if "--hicache-storage-backend" in options:  # the next server has what this one writes
                stop_gracefully(server)
        return drafted_for(answers, folder / "proposals")


def assert_same_drafts(found: Drafted, device: Drafted) -> None:
    """At every step, and as long."""
    comparison = compare(found, device)
    assert comparison.steps > 0
    assert not comparison.different, comparison
    assert abs(found.accept_length / device.accept_length - 1.0) <= CLOSE


@pytest.fixture(scope="module")
def traffic(full: bool) -> Traffic:
    """What is asked: of two rounds the second one hits already."""
    return TRAFFIC if full else dataclasses.replace(TRAFFIC, rounds=2)


@pytest.fixture(scope="module")
def on_device(
    zygote: Zygote, traffic: Traffic, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Drafted]:
    """What is answered and drafted with all hits on the device, by name and page."""

    @functools.cache
    def of(name: str, page: int) -> Drafted:
        folder = tmp_path_factory.mktemp("device")
        return Drafts(zygote, folder, name, traffic).draft("device", traffic.rounds, page, *ROOM)

    return of


CELLS = [
    *(pytest.param(name, 16, marks=[] if name in FEW else pytest.mark.full) for name in KINDS),
    # a device alone resumes at whole pages of the table, and what several layers draft depends on
    # where a prompt was resumed
    pytest.param("eagle3", 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "page"), CELLS)
def test_drafts_after_hits_on_the_host(
    zygote: Zygote,
    tmp_path: Path,
    traffic: Traffic,
    on_device: Callable[[str, int], Drafted],
    name: str,
    page: int,
) -> None:
    expected = Drafts(zygote, tmp_path, name, traffic).without(page)
    device = on_device(name, page)
    drafts = Drafts(zygote, tmp_path, name, traffic)
    host = drafts.draft("host", traffic.rounds, page, *TIGHT, *HOST)
    assert hit_rates(host.answers)["host_share"] > 0
    assert not differences(host.answers, expected)
    assert not differences(device.answers, expected)
    assert_same_drafts(host, device)


@pytest.mark.full
@pytest.mark.parametrize("name", STORED)
def test_drafts_after_a_restart_with_storage(
    zygote: Zygote,
    tmp_path: Path,
    traffic: Traffic,
    on_device: Callable[[str, int], Drafted],
    name: str,
) -> None:
    """The last round is with a server that has nothing but what the first one has stored."""
    device = on_device(name, 16)
    stored = stored_in(tmp_path / "pages")[len(OURS) :]
    drafts = Drafts(zygote, tmp_path, name, traffic)
    first = drafts.draft("first", traffic.rounds - 1, 16, *ROOM, *stored)
    last = drafts.draft("last", 1, 16, *ROOM, *stored)
    assert sum(answer.storage_tokens for answer in last.answers) > 0
    assert not differences([*first.answers, *last.answers], device.answers)
    of_last = {key: value for key, value in device.proposals.items() if key in last.proposals}
    assert last.proposals == of_last
