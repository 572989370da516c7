"""KV of one byte a number: rounded once, it has to come back from every tier as it was."""

from pathlib import Path

import pytest

from launch.traffic import Traffic
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import Conversations, converse, differences
from tests.e2e.test_storage import stop_gracefully, stored_in

# What is computed for an answer and for a prompt differs in its last bit, and about one number in a
# million is then rounded to its other neighbor. Stock's own cache beside none gives other tokens
# for seed 29, for these it does not; one request at a time is the same in every run.
TRAFFIC = Traffic(conversations=5, rounds=3, parallel=1, seed=30)
TYPES = ["fp8_e4m3", pytest.param("fp8_e5m2", marks=pytest.mark.full)]


@pytest.mark.parametrize("kind", TYPES)
def test_fp8_comes_back_from_the_host_and_from_storage(serve, tmp_path: Path, kind: str) -> None:  # noqa: ANN001
    options = ["--kv-cache-dtype", kind, "--page-size", "16"]
    with serve(128, "--disable-radix-cache", *options, tokens=16384) as server:
        assert f"dtype: torch.float8_{kind[4:]}" in server.log.read_text()
        expected = converse(server, TRAFFIC)
    conversations = Conversations(TRAFFIC)
    with serve(128, *stored_in(tmp_path), *options, tokens=1024) as server:
        answers = conversations.hold(server, TRAFFIC.rounds - 1)
        assert_idle_and_alive(server)
        stop_gracefully(server)
    with serve(128, *stored_in(tmp_path), *options, tokens=1024) as server:
        last = conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert not differences([*answers, *last], expected)
    assert sum(answer.host_tokens for answer in answers) > 0
    assert sum(answer.storage_tokens for answer in last) > 0
