"""KV of one byte a number: rounded once, it has to come back from every tier as it was."""

import dataclasses
from pathlib import Path

import pytest

from launch.server import Server
from launch.traffic import Traffic, generate, tokens
from tests.e2e.conftest import assert_idle_and_alive
from tests.e2e.conversations import Answer, Conversations, converse, tops
from tests.e2e.rounded import ASKED, assert_same, compare
from tests.e2e.test_storage import stop_gracefully, stored_in

# one request at a time: what is computed is the same in every run
TRAFFIC = Traffic(conversations=5, rounds=3, parallel=1, seed=30)
PAGE = 16
TYPES = ["fp8_e4m3", pytest.param("fp8_e5m2", marks=pytest.mark.full)]


def _without_a_page(server: Server, answer: Answer) -> Answer:
    """What is answered to the same prompt with a page of other tokens in its middle."""
    prompt = next(TRAFFIC.session(answer.conversation)).prompt.tolist()
    start = len(prompt) // 2
    prompt[start : start + PAGE] = tokens(3, PAGE)
    result = generate(server, prompt, len(answer.output), **ASKED)
    output = tuple(result["output_ids"])
    return dataclasses.replace(answer, output=output, tops=tops(result["meta_info"]))


@pytest.mark.parametrize("kind", TYPES)
def test_fp8_comes_back_from_the_host_and_from_storage(serve, tmp_path: Path, kind: str) -> None:  # noqa: ANN001
    options = ["--kv-cache-dtype", kind, "--page-size", str(PAGE)]
    with serve(128, "--disable-radix-cache", *options, tokens=16384) as server:
        assert f"dtype: torch.float8_{kind[4:]}" in server.log.read_text()
        expected = converse(server, TRAFFIC, **ASKED)
        lost = _without_a_page(server, expected[0])
    assert compare([lost], expected).wrong, "a page of other KV is not told from rounding"
    conversations = Conversations(TRAFFIC, **ASKED)
    with serve(128, *stored_in(tmp_path), *options, tokens=1024) as server:
        answers = conversations.hold(server, TRAFFIC.rounds - 1)
        assert_idle_and_alive(server)
        stop_gracefully(server)
    with serve(128, *stored_in(tmp_path), *options, tokens=1024) as server:
        last = conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert_same([*answers, *last], expected)
    assert sum(answer.host_tokens for answer in answers) > 0
    assert sum(answer.storage_tokens for answer in last) > 0
