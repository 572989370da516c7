"""Two servers that share one Mooncake store over TCP."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.mooncake import environment, store_running
from launch.server import OURS, Server
from launch.traffic import Traffic, generate
from tests.conftest import ROOT
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import Conversations, differences
from tests.e2e.test_operations import refused
from tests.e2e.test_storage import TIERS, cached, flush, prompt, reusable_share

PAGE = 64
TRAFFIC = Traffic(conversations=6, rounds=4, fork=0.0, parallel=3, seed=31)


def test_a_conversation_goes_on_elsewhere_and_the_store_may_die(  # noqa: ANN201
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
):
    """Begun on A, continued on B; SIGKILL of the store between two requests of a round; the
    store comes back, empty, and is used again by both without a restart."""
    expected = reference(128, TRAFFIC)
    # neither what a busy machine needs for a read, nor for the way from a read to the next call
    # makes a difference
    with store_running(tmp_path / "mooncake.log", lease_s=600) as store:
        settings = {"prefetch_threshold": PAGE, "prefetch_timeout_base": 10}
        options = [
            *(*OURS, *TIERS, "--page-size", str(PAGE), *store.options(**settings)),
            *("--hicache-storage-prefetch-policy", "timeout"),
        ]
        with (
            serve(128, *options, tokens=8192, **environment()) as first,
            serve(128, *options, tokens=8192, **environment()) as second,
        ):
            conversations = Conversations(TRAFFIC)
            begun = conversations.hold(first, 1)
            flush(first)  # what it has promised is written then
            moved = conversations.hold(second, 1)
            share = reusable_share(begun, moved, PAGE)
            assert share >= 0.95, f"{share:.3f} of the reusable tokens came from the store"

            killer = threading.Timer(0.3, store.kill)
            killer.start()
            answers = [*begun, *moved, *conversations.hold(first, 1)]
            killer.join()
            # one step after another without a store
            answers += conversations.hold(second, 1)
            assert not differences(answers, expected)

            store.start()
            for number, server in enumerate((first, second)):
                wait_until_used(server, prompt(number))
                flush(server)
            again = Conversations(TRAFFIC)
            repeated = again.hold(first, 1)
            flush(first)
            repeated += again.hold(second, 1)
            assert not differences(repeated, expected)
            late = [a for a in repeated if a.round == 1]
            assert sum(a.storage_tokens for a in late) > 0, "the store is not used again"
            # what was just read is under a lease, and stays
            refused(lambda: second.post("/hicache/storage-backend/clear", {}))
            for server in (first, second):
                assert_idle_and_alive(server)


def wait_until_used(server: Server, tokens: list[int]) -> None:
    """A server leaves a broken store alone for a while, and then tries again."""
    deadline = time.monotonic() + 180
    while not cached(generate(server, tokens, 1))["storage"]:
        assert time.monotonic() < deadline, "the store is not used again"
        time.sleep(0.5)
        flush(server)


@pytest.mark.full
def test_small_pages_fit_into_its_queue(tmp_path: Path) -> None:
    """With pages of one token, reads beside writes: a queue of Mooncake's that is full fails what
    comes next."""
    with store_running(tmp_path / "mooncake.log", memory_mb=512) as store:
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.mooncake_batches", str(store.port)],
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, **environment()},
            text=True,
            timeout=600,
        )
    moved = re.search(r"^moved (\d+) of (\d+)$", done.stdout, re.MULTILINE)
    assert moved, done.stderr[-2000:]
    assert moved[1] == moved[2]
