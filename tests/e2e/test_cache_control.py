"""What an operator asks of the cache of a real server: see docs/cache-control.md."""

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.bench import metrics
from launch.server import OURS, Server, dp_attention
from launch.traffic import tokens
from sglang_ext.tools import cache
from tests.conftest import ROOT
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.test_operations import attach
from tests.e2e.test_storage import TIERS, cached, flush, prompt, stored_in, when_idle
from tests.fixtures.scrape import Scrape

KEY, PAGE = "secret", 16
KEPT, ASKED = 1, range(1, 5)
LENGTH, ANSWER = 410, 8
PRESSURE = range(100, 130)
"""Prompts that together take more than device and host have."""
KEYS = ["--api-key", "public", "--admin-api-key", KEY]
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
URL = "http://127.0.0.1:30000"
PATH = "/sglang_ext/cache/"


@pytest.fixture(scope="module")
def expected(serve) -> dict[int, list[int]]:  # noqa: ANN001
    """What a server without a prefix cache answers."""
    with serve(128, "--disable-radix-cache", tokens=8192) as server:
        return {seed: answer(server, seed)[0] for seed in ASKED}


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ANN001
    """A server with both keys and a storage."""
    options = [*stored_in(tmp_path_factory.mktemp("pages")), "--page-size", str(PAGE), *KEYS]
    with serve(128, *options, "--enable-metrics", tokens=2048) as server:
        server.key = KEY
        yield server
        with as_user(server):
            assert_idle_and_alive(server)


@contextlib.contextmanager
def as_user(server: Server) -> Iterator[None]:
    """With the key of those who may only ask, where the server has keys."""
    key = server.key
    server.key = "public" if key else None
    yield
    server.key = key


def settled(server: Server) -> str:
    """As ``launch.bench.metrics.settled``."""
    with as_user(server):
        return metrics.settled(server)


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test begins with an empty cache."""
    yield
    if "server" in request.fixturenames:
        shared = request.getfixturevalue("server")
        flush(shared)
        shared.post("/hicache/storage-backend/clear", {})


def answer(server: Server, seed: int, **fields: Any) -> tuple[list[int], dict[str, int]]:
    """(tokens, cached tokens by tier) of one request."""
    body = {
        "input_ids": prompt(seed, LENGTH),
        "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER},
        **fields,
    }
    with as_user(server):
        result = server.post("/generate", body)
    return result["output_ids"], cached(result)


def call(server: Server, name: str, seed: int, **fields: Any) -> dict[str, Any]:
    """A call about the prompt of a seed."""
    said: dict[str, Any] = server.post(PATH + name, {"input_ids": prompt(seed, LENGTH), **fields})
    return said


def press(server: Server) -> None:
    """Fill device and host with other prompts."""
    for seed in PRESSURE:
        answer(server, seed)


def refused(ask: Callable[[], Any], status: int = 400) -> str:
    """What the server says to a call that it refuses."""
    with pytest.raises(httpx.HTTPStatusError) as error:
        ask()
    assert error.value.response.status_code == status
    return error.value.response.text


def test_a_pinned_prompt_stays_on_the_host(
    server: Server, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    # it would bring all back
    when_idle(lambda: server.post("/hicache/storage-backend", {}, method="DELETE"))
    try:
        assert answer(server, KEPT)[0] == expected[KEPT]
        assert answer(server, 2)[0] == expected[2]
        pinned = call(server, "pin", KEPT)["pinned"]
        assert LENGTH - PAGE <= pinned <= LENGTH
        press(server)
        assert call(server, "lookup", 2)["found"] < pinned
        found = call(server, "lookup", KEPT)
        assert found["pinned"] == pinned
        assert found["host"] >= pinned
        assert found["found"] >= pinned
        assert found["storage"] is None
        scrape = Scrape(settled(server))
        assert scrape.total("pinned_tokens", tier="host") == pinned
        output, where = answer(server, KEPT)
        assert output == expected[KEPT]
        assert sum(where.values()) >= pinned - PAGE
        assert call(server, "unpin", KEPT)["unpinned"] == pinned
        assert call(server, "unpin", KEPT)["unpinned"] == 0
        found = call(server, "lookup", KEPT)
        assert (found["found"], found["pinned"]) == (pinned, 0)
    finally:
        when_idle(lambda: attach(server, tmp_path))


def test_a_flush_ends_all_pins(server: Server) -> None:
    answer(server, KEPT)
    assert call(server, "pin", KEPT)["pinned"] > 0
    flush(server)
    found = call(server, "lookup", KEPT)
    assert (found["device"], found["host"], found["pinned"]) == (0, 0, 0)


def test_pins_beyond_their_share_are_refused(server: Server) -> None:
    pinned, said = 0, ""
    for seed in PRESSURE:
        answer(server, seed)
        try:
            pinned += call(server, "pin", seed)["pinned"]
        except httpx.HTTPStatusError as error:
            said = error.response.text
            break
    assert "SGLANG_EXT_PINNED_SHARE=0.25" in said
    assert said.count("\n") == 0
    assert server.post(PATH + "unpin", {"all": True})["unpinned"] == pinned > 0


def test_what_is_dropped_is_computed_again(server: Server, expected: dict[int, list[int]]) -> None:
    answer(server, KEPT, extra_key="a")
    answer(server, KEPT, extra_key="b")
    answer(server, 2)
    settled(server)
    dropped = call(server, "drop", KEPT, extra_key="a")
    assert dropped["dropped"] >= LENGTH - PAGE
    assert dropped["held"] == 0
    found = call(server, "lookup", KEPT, extra_key="a")
    assert (found["device"], found["host"]) == (0, 0)
    assert found["storage"] > 0  # which a drop does not reach
    assert call(server, "lookup", KEPT, extra_key="b")["found"] > 0
    assert server.post(PATH + "drop", {"extra_key": "b"})["dropped"] >= LENGTH - PAGE
    assert call(server, "lookup", KEPT, extra_key="b")["found"] == 0
    assert call(server, "lookup", 2)["found"] > 0
    server.post("/hicache/storage-backend/clear", {})
    for key in ("a", "b", None):
        output, where = answer(server, KEPT, extra_key=key)
        assert output == expected[KEPT]
        assert sum(where.values()) == 0


def test_storage_is_read_before_anybody_asks(
    server: Server, expected: dict[int, list[int]]
) -> None:
    answer(server, KEPT)
    settled(server)
    flush(server)
    before = call(server, "lookup", KEPT)
    assert (before["device"], before["host"], before["found"]) == (0, 0, 0)
    assert before["storage"] >= LENGTH - PAGE
    read = call(server, "preload", KEPT)
    assert read["read"] == read["found"] >= LENGTH - PAGE
    output, where = answer(server, KEPT)
    assert output == expected[KEPT]
    assert where == {"device": 0, "host": 400, "storage": 0}


def quota(server: Server, **fields: Any) -> dict[str, Any]:
    """A call about quotas."""
    said: dict[str, Any] = server.post(PATH + "quota", fields)
    return said


def used(server: Server) -> dict[str, int]:
    """Bytes of the host that namespaces have, by their extra keys."""
    return {one["extra_key"]: one["used"] for one in quota(server, list=True)["namespaces"]}


def test_a_namespace_keeps_to_its_quota(
    server: Server, expected: dict[int, list[int]], tmp_path: Path
) -> None:
    # it would bring all back
    when_idle(lambda: server.post("/hicache/storage-backend", {}, method="DELETE"))
    try:
        for key in ("a", "b"):
            for seed in (1, 2):
                assert answer(server, seed, extra_key=key)[0] == expected[seed]
        settled(server)
        before = used(server)
        assert before["a"] == before["b"] > 0
        bound = before["a"] * 3 // 4
        said = quota(server, extra_key="a", size=f"{bound}B")
        assert said["bound"] == bound
        assert 0 < said["used"] <= bound
        assert used(server) == {"a": said["used"], "b": before["b"]}
        for seed in (3, 4):
            assert answer(server, seed, extra_key="a")[0] == expected[seed]
            now = settled(server)
            assert used(server)["b"] == before["b"]
            assert used(server)["a"] <= bound
        scrape = Scrape(now)
        assert scrape.total("namespace_bytes", extra_key="a", state="quota") == bound
        assert scrape.total("namespace_bytes", extra_key="a", state="used") == used(server)["a"]
        assert scrape.total("namespace_bytes", extra_key="b") == 0
        asked = call(server, "lookup", 1, extra_key="a")
        assert (asked["namespace_bytes"], asked["quota_bytes"]) == (used(server)["a"], bound)
        flush(server)
        assert quota(server, list=True)["namespaces"] == [
            {"extra_key": "a", "cache_salt": None, "used": 0, "bound": bound}
        ]
        quota(server, extra_key="a", size="0%")
        for key in ("a", "b"):
            for seed in ASKED:
                assert answer(server, seed, extra_key=key)[0] == expected[seed]
        settled(server)
        assert used(server)["a"] == 0 < used(server)["b"]
        answer(server, 4, extra_key="a")  # the device has it then
        said_no = refused(lambda: call(server, "pin", 4, extra_key="a"))
        assert "its quota, 0 bytes" in said_no
        assert quota(server, extra_key="a", clear=True)["cleared"] == 1
        assert quota(server, extra_key="a", clear=True)["cleared"] == 0
    finally:
        when_idle(lambda: attach(server, tmp_path))


def test_who_may_call(server: Server) -> None:
    for key in (None, "public", "guess"):
        for name in cache._CALLS:
            server.key = key
            said = refused(lambda name=name: call(server, name, KEPT), 401)
            assert "Unauthorized" in said
    server.key = KEY


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("lookup", {}, "a prompt: input_ids or text"),
        ("lookup", {"input_ids": [1], "text": "t1"}, "not both"),
        ("lookup", {"input_ids": ["a"]}, "Expected `int`"),
        ("pin", {"tokens": [1]}, "unknown field `tokens`"),
        ("drop", {}, "/flush_cache drops everything"),
        ("unpin", {}, '"all": true'),
        ("pin", {"all": True}, 'does not take "all"'),
        ("quota", {"size": "much"}, "use bytes like 20GB"),
    ],
)
def test_what_makes_no_sense_is_refused(
    server: Server, name: str, body: dict[str, Any], said: str
) -> None:
    assert said in json.loads(refused(lambda: server.post(PATH + name, body)))["error"]


def commands() -> list[list[str]]:
    """Words behind ``sglang-ext cache`` of the document, in its order."""
    text = (ROOT / "docs" / "cache-control.md").read_text()
    lines = [shlex.split(line) for block in BLOCK.findall(text) for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["sglang-ext", "cache"]]


def test_the_commands_of_the_document_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "prompt.json"
    ids.write_text(json.dumps(prompt(KEPT, LENGTH)))
    answer(server, KEPT)
    answer(server, 2, extra_key="tenant-7")
    settled(server)
    assert {words[0] for words in commands()} == set(cache._CALLS)
    for words in commands():
        here = [word.replace(URL, server.url).replace("prompt.json", str(ids)) for word in words]
        assert cache.main([*here, "--api-key", KEY]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(commands())  # a list has a line for each namespace, and one for all
    assert lines[0].startswith("410 tokens: a request finds 4")
    assert lines[5].endswith("are dropped, 0 stay with requests that run")
    assert lines[-1].endswith("of the host, and may have all of it")


def test_a_text_is_what_generate_takes(server: Server) -> None:
    # words that do not begin with that of a special token
    ids = tokens(KEPT, LENGTH, range(200, 512))
    text = " ".join(f"t{token}" for token in ids)
    answer(server, KEPT, input_ids=ids)
    settled(server)  # or storage has it in the second lookup alone
    found = server.post(PATH + "lookup", {"text": text})
    assert found["found"] >= LENGTH - PAGE
    assert found == server.post(PATH + "lookup", {"input_ids": ids})


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tp", "dp"])
def test_ranks_agree(serve, expected: dict[int, list[int]], kind: str) -> None:  # noqa: ANN001
    ranks = ["--tp", "2"] if kind == "tp" else dp_attention(2)
    options = [*OURS, *TIERS, "--page-size", str(PAGE), *ranks, *KEYS, "--enable-metrics"]
    with serve(128, *options, tokens=2048, **RANKS) as server:
        server.key = KEY
        for seed in ASKED:
            answer(server, seed)
        pinned = {seed: call(server, "pin", seed) for seed in (KEPT, 2)}
        assert all(said["pinned"] > 0 for said in pinned.values())
        assert ("ranks" in pinned[KEPT]) == (kind == "dp")
        assert call(server, "drop", 2)["dropped"] > 0
        assert call(server, "lookup", 2)["pinned"] == 0
        press(server)
        assert call(server, "lookup", KEPT)["host"] >= pinned[KEPT]["pinned"]
        for seed in ASKED:
            assert answer(server, seed)[0] == expected[seed]
        bound = quota(server, extra_key="a", size="10%")["bound"]
        for seed in ASKED:
            for key in ("a", "b"):
                assert answer(server, seed, extra_key=key)[0] == expected[seed]
        settled(server)
        listed = quota(server, list=True)
        assert ("ranks" in listed) == (kind == "dp")
        assert bound == listed["host"] // 10
        assert 0 < used(server)["a"] <= bound
        assert quota(server, extra_key="a", size="0%")["used"] == 0
        for seed in ASKED:
            assert answer(server, seed, extra_key="a")[0] == expected[seed]
        with as_user(server):
            assert_idle_and_alive(server)
