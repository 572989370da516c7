"""The storage tier on real servers."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.bench.metrics import metric, settled
from launch.server import OURS, Server
from launch.traffic import Traffic, generate, tokens
from sglang_ext.tools import verify
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.conversations import Answer, Conversations, differences
from tests.e2e.exported import assert_all_is_there, assert_counted
from tests.fixtures.kv_subscriber import KvSubscriber
from tests.fixtures.kv_view import DISK, GPU, ON_HOST
from tests.fixtures.scrape import Scrape
from tests.soak.weights_under_load import NOT_FLUSHED

TIERS = ("--enable-hierarchical-cache", "--hicache-ratio", "2")
TRAFFIC = Traffic(conversations=6, rounds=4, fork=0.0, parallel=4, seed=23)
PAGE, WINDOW_PAGES = 16, 8
TIER_NAMES = ("device", "host", "storage")
BUSY = ("not idle", "Flush cache failed", NOT_FLUSHED)
"""What a server says to a call that it refuses until it is idle, which it is not at once after an
answer: the batch of the answer is its last one for a moment."""


def stored_in(directory: Path, policy: str = "wait_complete", **settings: Any) -> list[str]:
    """Options of a server with pages in a directory."""
    extra = {"file_storage_path": str(directory), "prefetch_threshold": 16, **settings}
    return [
        *OURS,
        *TIERS,
        *("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", policy),
        *("--hicache-storage-backend-extra-config", json.dumps(extra)),
    ]


def stop_gracefully(server: Server) -> None:
    """As an operator does: the main process alone gets the signal."""
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(timeout=300)


def prompt(seed: int, length: int = 400) -> list[int]:
    """A random prompt."""
    return tokens(seed, length)


def cached(result: dict[str, Any]) -> dict[str, int]:
    """Cached tokens by tier."""
    details = result["meta_info"]["cached_tokens_details"] or {}
    return {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}


def pages_in(directory: Path, ending: str = "") -> list[Path]:
    """Files of pages: of full attention, or those that end with ``.swa``."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name[0] != "."]
    return sorted(path for path in files if path.suffix == ending)


def reusable_share(before: Sequence[Answer], after: Sequence[Answer], page: int) -> float:
    """Part of the reusable tokens that came from storage: whole pages of what the round before
    has computed, that is all but its last token."""
    computed = {a.conversation: a.prompt_tokens + len(a.output) - 1 for a in before}
    reusable = sum(computed[a.conversation] // page * page for a in after)
    return sum(a.storage_tokens for a in after) / reusable


def test_the_next_round_after_a_restart_comes_from_storage(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    """Six conversations, a graceful stop, a fresh server; then a third of the files is torn,
    flipped or another page's, and a third server serves the last round."""
    options = [*stored_in(tmp_path), "--page-size", "64", "--enable-metrics"]
    options += ["--extra-metric-labels", '{"zone": "north"}']
    conversations = Conversations(TRAFFIC)
    with serve(128, *options, tokens=8192) as server:
        answers = conversations.hold(server, 2)
        assert_idle_and_alive(server)
        assert_measured(settled(server), "backup", "backuped_tokens_total")
        stop_gracefully(server)
    with serve(128, *options, tokens=8192) as server:
        after = conversations.hold(server, 1)
        assert_idle_and_alive(server)
        server.post("/sglang_ext/cache/quota", {"extra_key": "nobody", "size": "1GB"})
        metrics = settled(server)
        assert_measured(metrics, "prefetch", "prefetched_tokens_total")
        hits = metric(metrics, "sglang:storage_prefetch_hit_tokens_total")
        assert hits >= sum(answer.storage_tokens for answer in after) > 0
        assert "sglang:storage_prefetch_unfulfilled_tokens_total" in metrics
        scrape = Scrape(metrics)
        assert_all_is_there(scrape, zone="north")
        tiers = {t: sum(getattr(a, f"{t}_tokens") for a in after) for t in TIER_NAMES}
        assert_counted(scrape, tiers, sum(a.prompt_tokens for a in after), 64)
        assert scrape.total("hit_tokens_total", component="swa", tier="storage") > 0
        assert scrape.total("storage_operations_total", kind="read", result="all") > 0
        assert scrape.total("transfer_bytes_sum", direction="read") > 0
        assert scrape.total("storage_wait_seconds_count") >= len(after)
        stop_gracefully(server)
    assert not differences([*answers, *after], reference(128, TRAFFIC))
    share = reusable_share(answers[-TRAFFIC.conversations :], after, 64)
    assert share >= 0.95, f"{share:.3f} of the reusable tokens came from storage"
    damage(tmp_path)
    with serve(128, *options, tokens=8192) as server:
        last = conversations.hold(server, 1)
        assert_idle_and_alive(server)
        assert metric(settled(server), "sglang_ext:storage_files_total") > 0
    assert not differences(last, reference(128, TRAFFIC))
    assert reusable_share(after, last, 64) < share


def assert_measured(metrics: str, direction: str, total: str) -> None:
    """The engine's metrics of storage: tokens, and for each batch its pages and GB/s."""
    assert metric(metrics, f"sglang:{total}", 'storage_backend="file"') > 0
    for name in (f"{direction}_pgs", f"{direction}_bandwidth"):
        assert metric(metrics, f"sglang:{name}_count") > 0
        assert metric(metrics, f"sglang:{name}_sum") > 0


def damage(directory: Path) -> None:
    """A third of the files is torn, flipped, or holds another page."""
    rng = random.Random(5)
    files = pages_in(directory) + pages_in(directory, ".swa")
    for path in rng.sample(files, len(files) // 3):
        data = bytearray(path.read_bytes())
        kind = rng.randrange(3)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data = bytearray(rng.choice(files).read_bytes())
        path.write_bytes(data)


def test_a_restart_with_write_back_and_pages_of_one_token(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    """What is on the device alone is written by a graceful stop."""
    options = [*stored_in(tmp_path), "--page-size", "1", "--hicache-write-policy", "write_back"]
    conversations = Conversations(TRAFFIC)
    with serve(128, *options, tokens=8192) as server:
        answers = conversations.hold(server, 1)
        assert_idle_and_alive(server)
        stop_gracefully(server)
    with serve(128, *options, tokens=8192) as server:
        after = conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert not differences([*answers, *after], reference(128, TRAFFIC))
    share = reusable_share(answers, after, 16)
    assert share >= 0.95, f"{share:.3f} of the reusable tokens came from storage"


def test_two_ranks_agree_on_what_storage_has(
    serve,  # noqa: ANN001
    reference,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    """Each rank has its part of a page in a directory of its own; some files of one are gone."""
    traffic = Traffic(conversations=6, rounds=3, fork=0.0, seed=11)
    options = [*stored_in(tmp_path), "--page-size", str(PAGE), "--tp", "2"]
    conversations = Conversations(traffic)
    with serve(128, *options, tokens=8192, **RANKS) as server:
        answers = conversations.hold(server, 1)
        flush(server)
        of_one_rank = [path for path in pages_in(tmp_path, ".swa") if "1-of-2" in path.parts]
        assert of_one_rank
        for path in of_one_rank[::9]:
            path.unlink()
        answers += conversations.hold(server, 1)
        flush(server)
        answers += conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert not differences(answers, reference(128, traffic))
    assert sum(a.storage_tokens for a in answers if a.round == 1) > 0
    share = reusable_share(answers[6:12], answers[12:], PAGE)
    assert share >= 0.95, f"{share:.3f} of the reusable tokens came from storage"


def test_a_hit_without_its_window_resumes_from_the_last_checkpoint(
    serve,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    """The last window in storage is lost; the full pages stay."""
    options = [*stored_in(tmp_path), "--page-size", str(PAGE)]
    with serve(128, *options, tokens=8192) as server:
        expected = generate(server, prompt(1, 1201), 8)["output_ids"]
        hits = []
        for _ in range(2):
            flush(server)
            result = generate(server, prompt(1, 1201), 8)
            assert result["output_ids"] == expected
            hits.append(cached(result)["storage"])
            flush(server)
            full = len(pages_in(tmp_path))
            windows = sorted(pages_in(tmp_path, ".swa"), key=lambda path: path.stat().st_mtime_ns)
            # the pages of the window at the end of the prompt
            for path in windows[-WINDOW_PAGES:]:
                path.unlink()
        assert len(pages_in(tmp_path)) == full
    assert hits[0] == 1200
    assert 0 < hits[1] < hits[0], hits
    assert hits[0] - hits[1] <= 256 + PAGE, "further back than one checkpoint"


def test_attach_detach_clear_and_verify(serve, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    """A server that starts without storage."""
    router = KvSubscriber()
    options = [*OURS, *TIERS, *router.options, "--page-size", "64", "--admin-api-key", "secret"]
    with router, serve(128, *options, tokens=8192) as server:
        server.key = "secret"
        check = ["--url", server.url, "--yes", "--api-key", "secret"]
        first = generate(server, prompt(1), 8)
        assert verify.main([*check, "--prompts", "1", "--seed", "1"]) == 1
        assert "no token came from storage" in capsys.readouterr().err
        attach(server, tmp_path)
        assert verify.main([*check, "--prompts", "2", "--seed", "2"]) == 0
        assert "OK" in capsys.readouterr().out
        generate(server, prompt(1), 8)
        flush(server)
        again = generate(server, prompt(1), 8)
        assert again["output_ids"] == first["output_ids"]
        assert cached(again)["storage"] > 0
        server.post("/hicache/storage-backend/clear", {})
        flush(server)
        assert cached(generate(server, prompt(1), 8)) == {"device": 0, "host": 0, "storage": 0}
        flush(server)  # nobody writes any more where files are put and removed
        place = next(tmp_path.glob("*/0-of-1/ff"))
        shutil.rmtree(place)
        place.write_text("in the way")
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            server.post("/hicache/storage-backend/clear", {})
        place.unlink()
        server.post("/hicache/storage-backend/clear", {})
        shutil.rmtree(tmp_path)
        generate(server, prompt(3), 8)
        flush(server)
        assert cached(generate(server, prompt(3), 8))["storage"] > 0, "it has not healed"
        generate(server, prompt(1), 8)
        view = router.wait_for(lambda view: view.at(DISK))
        assert view.at(DISK) <= view.at(GPU) | view.at(ON_HOST)
        when_idle(lambda: server.post("/hicache/storage-backend", {}, method="DELETE"))
        router.wait_for(lambda view: not view.at(DISK))
        assert view.at(GPU)
        flush(server)
        gone = generate(server, prompt(1), 8)
        assert cached(gone)["storage"] == 0
        attach(server, tmp_path)
        flush(server)
        assert cached(generate(server, prompt(1), 8))["storage"] > 0
        assert_idle_and_alive(server)


def test_a_prompt_that_gives_way_keeps_its_beginning(serve, tmp_path: Path) -> None:  # noqa: ANN001
    """A bound that a long prompt and a short one do not fit into together."""
    long, short = prompt(1, 1600), prompt(2, 400)
    checkpoints = {"SGLANG_EXT_CHECKPOINT_TOKENS": "256"}
    options = [*stored_in(tmp_path, max_size="1300K"), "--page-size", str(PAGE)]
    with serve(128, *options, tokens=8192, **checkpoints) as server:
        first = generate(server, long, 8)
        wait_until_stored(tmp_path, long, since=0)
        flush(server)
        since = time.time_ns()
        generate(server, short, 8)
        wait_until_stored(tmp_path, short, since=since)
        flush(server)
        again = generate(server, long, 8)
        assert again["output_ids"] == first["output_ids"]
        # 157 files of 8 KB, of which the short one takes 42; a tenth more may go at a time
        assert 1000 <= cached(again)["storage"] < 1600 // PAGE * PAGE
        assert_idle_and_alive(server)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1_300_000


def wait_until_stored(directory: Path, prompt: list[int], *, since: int) -> None:
    """Wait for the whole pages of a prompt: a flush drops what is not in storage yet.

    Args:
        since: nanoseconds; files that were written or used before are others.
    """
    deadline = time.monotonic() + 180
    while sum(used_at(path) >= since for path in pages_in(directory)) < len(prompt) // PAGE:
        assert time.monotonic() < deadline, "not stored"
        time.sleep(0.05)


def used_at(path: Path) -> int:
    """When a file was used last, in nanoseconds; 0 for one that is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def attach(server: Server, directory: Path) -> None:
    """Attach a directory while the server runs."""
    body = {
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config_json": json.dumps(
            {"file_storage_path": str(directory), "prefetch_threshold": 16}
        ),
    }
    when_idle(lambda: server.post("/hicache/storage-backend", body, method="PUT"))


def wait_until_idle(server: Server) -> None:
    """Nothing is copied or written any more, and the checks at idle were made."""
    time.sleep(0.5)
    assert_idle_and_alive(server)


def when_idle(call: Callable[[], Any]) -> Any:
    """Make a call that a server refuses until it is idle."""
    deadline = time.monotonic() + 180
    while True:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            said = error.response.text
            if not any(text in said for text in BUSY) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def flush(server: Server) -> None:
    """Empty device and host as soon as storage has what it was promised. A call with a timeout is
    looked at again when an idle scheduler wakes, a second later."""
    when_idle(lambda: server.post("/flush_cache", {}))


def test_storage_with_faults(serve, reference, tmp_path: Path, full: bool) -> None:  # noqa: ANN001
    """Misses after hits, short reads, slow and hanging operations, a full disk: all tokens are
    right, and no request waits for ever."""
    traffic = dataclasses.replace(TRAFFIC, rounds=4 if full else 3, fork=0.3, seed=29)
    faulty = {
        "backend_name": "faulty",
        "module_path": "tests.e2e.faulty_backend",
        "class_name": "FaultyBackend",
        "interface_v1": 1,
        "file_storage_path": str(tmp_path),
        "prefetch_threshold": 16,
        "prefetch_timeout_base": 0.5,
        "seed": 3,
    }
    options = [
        *(*OURS, *TIERS, "--page-size", str(PAGE), "--hicache-storage-backend", "dynamic"),
        *("--hicache-storage-backend-extra-config", json.dumps(faulty)),
        *("--hicache-storage-prefetch-policy", "timeout"),
    ]
    conversations = Conversations(traffic)
    with serve(128, *options, tokens=2048) as server:
        answers = conversations.hold(server, 1)
        for _ in range(1, traffic.rounds):
            flush(server)  # what the next round finds has come through the faults
            answers += conversations.hold(server, 1)
        assert_idle_and_alive(server)
    assert not differences(reference(128, traffic), answers)
    assert sum(a.storage_tokens for a in answers) > 0
