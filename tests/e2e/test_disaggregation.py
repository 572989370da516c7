"""Prefill and decode on two servers, the cache on the one that prefills."""

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import pytest

from launch.models.tiny import make_model, parse_args
from launch.server import CPU, OURS
from launch.traffic import Traffic, tokens
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.conversations import Answer, Conversations, converse, differences
from tests.e2e.disaggregated import Pair, disaggregated
from tests.e2e.test_storage import flush, stored_in, wait_until_idle
from tests.e2e.test_window_only import CHECKS

TRAFFIC = Traffic(conversations=6, rounds=4, seed=41)
HOST = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
CHUNKS = ("--chunked-prefill-size", "256")


def hold(pair: Pair, *, stored: bool = True) -> tuple[list[Answer], list[Answer]]:
    """(all rounds but the last one, the last one, whose prefixes come from storage)."""
    conversations = Conversations(TRAFFIC)
    answers = conversations.hold(pair, TRAFFIC.rounds - 1)
    if stored:
        flush(pair.prefill)
    return answers, conversations.hold(pair, 1)


def assert_exact(pair: Pair, expected: Sequence[Answer], *, stored: bool = True) -> list[Answer]:
    """The conversations get the tokens of a server without a cache, with hits in all tiers, and
    leave nothing behind."""
    answers, last = hold(pair, stored=stored)
    assert not differences([*answers, *last], expected)
    assert sum(a.device_tokens for a in answers) > 0
    assert sum(a.host_tokens for a in answers) > 0
    assert not stored or sum(a.storage_tokens for a in last) > 0
    assert_nothing_left(pair)
    return [*answers, *last]


def assert_nothing_left(pair: Pair) -> None:
    """Both servers are idle, pass their checks, and the whole device of the one that prefills
    can be had."""
    wait_until_idle(pair.prefill)
    flush(pair.prefill)
    for server in (pair.prefill, pair.decode):
        assert_idle_and_alive(server)


class Leavers:
    """Clients that go away in the middle, one after the other, for the length of a with-block.

    They leave both servers, or have asked one of them alone, which waits for the other.

    Attributes:
        left: how many requests they have left.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self.left = 0
        self._pair = pair
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _go_on(self) -> None:
        both = [self._pair.prefill, self._pair.decode]
        with ThreadPoolExecutor(2) as pool:
            while not self._ended.is_set():
                prompt = tokens(self._random.randrange(4), 700)
                sampling = {"temperature": 0, "max_new_tokens": 100}
                body = self._pair.meeting({"input_ids": prompt, "sampling_params": sampling})
                asked = self._random.choice([both, both, both[:1], both[1:]])
                seconds = [self._random.uniform(0.02, 0.6) for _ in asked]
                ends = [
                    pool.submit(server.post, "/generate", body, stay)
                    for server, stay in zip(asked, seconds, strict=True)
                ]
                self.left += sum(isinstance(end.exception(), httpx.ReadTimeout) for end in ends)


def test_tokens_are_exact_and_those_who_leave_take_nothing_along(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    expected = reference(128, TRAFFIC)
    page = ["--page-size", "16"]
    options = [*stored_in(tmp_path), *page, *CHUNKS]
    with disaggregated(serve, 128, options, page, tokens=1536) as pair:
        assert_exact(pair, expected)
        with Leavers(pair, 5) as leavers:
            answers, last = hold(pair, stored=False)
        assert leavers.left > 0
        assert not differences([*answers, *last], expected)
        assert_nothing_left(pair)


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "options", "environment"),
    [
        ("64", ["--chunked-prefill-size", "64", "--hicache-write-policy", "write_back"], {}),
        ("16", [*CHUNKS, "--disable-overlap-schedule"], {}),
        ("16", [*CHUNKS, "--tp", "2"], RANKS),
    ],
    ids=["page-64", "no-overlap", "tp-2"],
)
def test_other_prefill_servers(  # noqa: ANN201
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
    page: str,
    options: list[str],
    environment: dict[str, str],
):
    expected = reference(128, TRAFFIC)
    both = ["--page-size", page]
    options = [*stored_in(tmp_path), *both, *options]
    with disaggregated(serve, 128, options, both, tokens=1536, **environment) as pair:
        assert_exact(pair, expected)


@pytest.mark.full
def test_transfers_that_fail_take_nothing_along(serve, tmp_path: Path) -> None:  # noqa: ANN001
    """What two ranks send of a long prompt does not fit into a queue of Mooncake's of the usual
    length: the engine refuses the request on both servers."""
    usual = {"MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "1024"}
    page = ["--page-size", "16"]
    options = [*stored_in(tmp_path), *page, "--chunked-prefill-size", "4096", "--tp", "2"]
    with disaggregated(serve, 128, options, page, tokens=4096, **RANKS, **usual) as pair:
        for talk in range(2):
            body = {"input_ids": tokens(talk, 3600), "sampling_params": {"max_new_tokens": 8}}
            with pytest.raises(httpx.HTTPStatusError, match=r"500 .* transfer failed"):
                pair.post("/generate", body)
        assert_nothing_left(pair)


@pytest.mark.full
def test_small_pages_are_shared_whole(serve, reference, tmp_path: Path) -> None:  # noqa: ANN001
    """What has been sent of a page must not be given back while it is read."""
    expected = reference(128, TRAFFIC)
    page = ["--page-size", "1"]
    options = [*stored_in(tmp_path), *page, "--chunked-prefill-size", "-1"]
    with disaggregated(serve, 128, options, page, tokens=1536) as pair:
        answers = assert_exact(pair, expected)
    assert not [a for a in answers if a.device_tokens % 16 or a.host_tokens % 16]


@pytest.mark.full
def test_windows_alone(serve, tmp_path: Path) -> None:  # noqa: ANN001
    """A model without full-attention layers."""
    model = tmp_path / "model"
    make_model(parse_args(["--out", str(model), "--window", "100", "--full-every", "99"]))
    both = ["--page-size", "1", "--model-path", str(model)]
    with serve(128, "--disable-radix-cache", *both, tokens=16384, **CHECKS) as server:
        expected = converse(server, TRAFFIC)
    options = [*HOST, *both, *CHUNKS]
    with disaggregated(serve, 128, options, both, tokens=1024, **CHECKS) as pair:
        assert_exact(pair, expected, stored=False)


@pytest.mark.full
def test_prompts_that_are_computed_before_anyone_asked_for_them(serve, reference) -> None:  # noqa: ANN001
    """Half of them have to begin again."""
    expected = reference(128, TRAFFIC)
    page = ["--page-size", "16"]
    options = [*HOST, *page, *CHUNKS, "--optimistic-prefill-attempts", "2"]
    again = {"SGLANG_TEST_FORCE_OPTIMISTIC_PREFILL_RETRY_PROB": "0.5"}
    with disaggregated(serve, 128, options, page, tokens=1536, **again) as pair:
        assert_exact(pair, expected, stored=False)


@pytest.mark.full
def test_a_decode_server_that_dies_leaves_nothing_with_the_prefill_server(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    page = ["--page-size", "16"]
    with disaggregated(serve, 128, [*stored_in(tmp_path), *page], page, tokens=1536) as pair:
        body = {"input_ids": tokens(1, 900), "sampling_params": {"max_new_tokens": 500}}
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(pair.post, "/generate", body) for _ in range(4)]
            killer = threading.Timer(0.5, pair.decode.kill)
            killer.start()
            assert any(request.exception() for request in asked)
            killer.join()
        wait_until_idle(pair.prefill)
        flush(pair.prefill)
        assert_idle_and_alive(pair.prefill)


def test_a_decode_server_is_refused(model, tmp_path, zygote) -> None:  # noqa: ANN001
    arguments = ["--model-path", str(model(128)), *OURS, "--disaggregation-mode", "decode"]
    server = zygote.start(arguments, tmp_path / "log", CPU)
    assert server.process.wait() != 0
    log = server.log.read_text()
    assert "sglang-ext: --disaggregation-mode decode is not supported" in log
    assert "Load weight begin" not in log
    server.stop()
