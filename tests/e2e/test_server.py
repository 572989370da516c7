"""Behaviour of the real server around the cache."""

import concurrent.futures
import contextlib
import json
import random
import re
import threading

import httpx
import pytest

from launch.bench.metrics import metric, settled
from launch.server import CPU, OURS, wait_until_ready
from launch.traffic import Traffic, generate, tokens
from sglang_ext.tools.status import Metrics, screen
from tests.e2e.conftest import RANKS, assert_idle_and_alive
from tests.e2e.conversations import converse, differences
from tests.e2e.exported import assert_counted
from tests.e2e.test_storage import flush
from tests.fixtures.kv_subscriber import KvSubscriber
from tests.fixtures.kv_view import GPU, ON_HOST
from tests.fixtures.scrape import Scrape

HOST = ["--enable-hierarchical-cache", "--hicache-ratio", "2"]
START = (
    r"write policy +write_through",
    r"retention +slru \(--radix-eviction-policy slru\)",
    r"copies +kernels; tried at start: [\d.]+ GB/s to the host",
    r"storage +none",
)
"""Of the table that a server logs at its start."""
SHOWN = (
    r"found, since start +0\.\d+ of [\d,]+ prompt tokens \(device 0\.\d*[1-9]\d*, host 0\.\d*[1-9]",
    r"device +\d+\.\d MB of full attention, \d+\.\d of windows",
    r"host +[1-9]\d*\.\d MB of full attention, \d+\.\d of windows; [\d.]+ MB of [\d.]+ MB \(full",
    r"copied +[1-9][\d,]* tokens and [1-9][\d,]* of windows to the host, [1-9][\d,]* tokens",
    r"retention +in the order of the eviction policy",
    r"trouble +none",
)
"""On the screen of a server with a host tier."""


def prompt(seed: int, length: int = 300) -> list[int]:
    """A random prompt."""
    return tokens(seed, length)


def cached(result: dict) -> dict[str, int]:
    """Cached tokens by tier."""
    return result["meta_info"]["cached_tokens_details"] or {"device": 0, "host": 0}


def test_who_is_scheduled_first_stays_longest(serve) -> None:  # noqa: ANN001
    """Low priority values first, by the scheduler and in the cache; requests without a priority
    have the largest value there is."""
    options = ["--enable-priority-scheduling", "--schedule-low-priority-values-first"]
    options += ["--radix-eviction-policy", "priority", "--page-size", "16"]
    asked = {1: {"priority": 1}, 2: {"priority": 3_000_000_000}, 3: {}}
    with serve(128, *OURS, *options) as server:
        for seed, priority in asked.items():
            generate(server, prompt(seed), 4, **priority)
        for seed in range(10, 20):  # all that there is room for beside one of the first
            generate(server, prompt(seed), 4, priority=2)
        found = {seed: cached(generate(server, prompt(seed), 4, **asked[seed])) for seed in asked}
        assert {seed: tiers["device"] for seed, tiers in found.items()} == {1: 288, 2: 0, 3: 0}
        assert_idle_and_alive(server)


def test_what_an_open_session_has_used_stays(serve) -> None:  # noqa: ANN001
    """Until it is closed; with a host tier, whose copies do not count here."""
    options = ["--enable-session-radix-cache", "--page-size", "16"]
    with serve(128, *OURS, *HOST, *options) as server:
        first = generate(server, prompt(1), 4, session_id="one")
        generate(server, prompt(2), 4)

        def others(begin: int) -> None:
            for seed in range(begin, begin + 10):  # all that there is room for beside one
                generate(server, prompt(seed), 4)

        others(10)
        found = generate(server, prompt(1), 4, session_id="one")
        assert found["output_ids"] == first["output_ids"]
        assert cached(found)["device"] == 288
        assert cached(generate(server, prompt(2), 4))["device"] == 0
        server.post("/close_session", {"session_id": "one"})
        others(30)
        assert cached(generate(server, prompt(1), 4))["device"] == 0
        assert_idle_and_alive(server)


def test_flush_metrics_and_policies(serve) -> None:  # noqa: ANN001
    """One server: metrics on, dfs-weight order, slru, flush, and the cache works again."""
    options = ["--enable-metrics", "--schedule-policy", "dfs-weight", "--page-size", "16"]
    options += ["--radix-eviction-policy", "slru"]
    with serve(128, *OURS, *HOST, *options) as server:
        first = generate(server, prompt(1), 8)
        again = generate(server, prompt(1), 8)
        assert again["output_ids"] == first["output_ids"]
        assert cached(again) == {"device": 288, "host": 0}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            others = list(pool.map(lambda seed: generate(server, prompt(seed), 8), range(2, 18)))
        # what came twice stays as long as those that run leave room, however many run at once
        long = generate(server, prompt(99, 2900), 8)
        evicted = generate(server, prompt(1), 8)
        assert evicted["output_ids"] == first["output_ids"]
        assert cached(evicted)["host"] > 0
        answers = (first, again, *others, long, evicted)
        found = {tier: sum(cached(a)[tier] for a in answers) for tier in ("device", "host")}
        prompts = sum(a["meta_info"]["prompt_tokens"] for a in answers)
        metrics = settled(server)
        scrape = Scrape(metrics)
        assert_counted(scrape, found, prompts, 16)
        assert scrape.total("eviction_age_seconds_count", component="full", tier="device") > 0
        assert scrape.total("transfer_lag_seconds_count", direction="load") > 0
        assert "sglang:hicache_host_used_tokens" in metrics
        for name in ("hicache_backup_bytes_total", "load_back_bytes_total"):
            assert metric(metrics, f"sglang:{name}") > 0
        for name in ("evicted_tokens_total", "eviction_duration_seconds_count"):
            assert metric(metrics, f"sglang:{name}") > 0
        for name in ("hicache_backup_duration_seconds", "load_back_duration_seconds"):
            copies, seconds = (metric(metrics, f"sglang:{name}_{of}") for of in ("count", "sum"))
            assert copies > 0
            assert 0 < seconds < 60
        # ``sglang-ext status`` finds all of that
        shown = "\n".join(screen(Metrics(metrics)))
        for said in SHOWN:
            assert re.search(said, shown), shown
        # sixteen prompts of 300 tokens beside the first one, on a device of 3,072
        assert 1000 < metric(metrics, "sglang:evicted_tokens_total") < 10_000
        reason = 'reason="write_through_unbacked_eviction"'
        assert f'pool="kv",pp_rank="0",{reason}' in metrics or reason in metrics
        flush(server)
        empty = generate(server, prompt(1), 8)
        assert cached(empty) == {"device": 0, "host": 0}
        assert empty["output_ids"] == first["output_ids"]
        assert cached(generate(server, prompt(1), 8))["device"] == 288
        assert_idle_and_alive(server)
        log = server.log.read_text()
        # windows of 128 tokens in a ratio of 2 to pools of 3,072 tokens and fewer
        assert log.count("a rank (--hicache-ratio 2)") == 1
        for said in START:
            assert re.search(said, log), said
        assert "Allocating" not in log, "the engine's own lines count the memory twice"


@pytest.mark.full
def test_aborts_and_retraction_under_pressure(serve, reference) -> None:  # noqa: ANN001
    """Clients that go away, and a device pool that cannot hold the running requests: with pages of
    one token, beside the soak."""
    traffic = Traffic(conversations=6, rounds=3, answer=(30, 90), parallel=6, seed=7)
    expected = reference(128, traffic)
    options = ["--page-size", "1", "--chunked-prefill-size", "128"]
    # the engine retracts a request every few steps even if there is room
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    with serve(128, *OURS, *HOST, *options, tokens=1600, **retract) as server:
        stop = threading.Event()

        def vandal() -> None:
            rng = random.Random(5)
            while not stop.is_set():
                rid = f"vandal-{rng.randrange(10**9):09d}"
                body = {
                    "rid": rid,
                    "input_ids": prompt(rng.randrange(6), 200),
                    "sampling_params": {"max_new_tokens": 60},
                }
                killer = threading.Timer(
                    rng.uniform(0.02, 0.4), server.post, ("/abort_request", {"rid": rid})
                )
                killer.start()
                # an aborted request answers with an error
                with contextlib.suppress(httpx.HTTPError):
                    server.post("/generate", body)
                killer.join()

        thread = threading.Thread(target=vandal)
        thread.start()
        try:
            answers = converse(server, traffic)
        finally:
            stop.set()
            thread.join()
        assert_idle_and_alive(server)
        assert "#retracted_reqs" in server.log.read_text(errors="replace")
    assert not differences(expected, answers)


@pytest.mark.full
def test_two_ranks_agree(serve, reference) -> None:  # noqa: ANN001
    traffic = Traffic(conversations=6, rounds=3, seed=11)
    router = KvSubscriber()
    options = ["--page-size", "16", "--tp", "2", *router.options]
    with router, serve(128, *OURS, *HOST, *options, tokens=2048, **RANKS) as server:
        answers = converse(server, traffic)
        router.wait_for(lambda view: view.at(GPU) and view.at(ON_HOST))
        assert_idle_and_alive(server)
        log = server.log.read_text()
        assert log.count("MB on all 2 ranks") == 1, "one table, of one rank"
    assert not differences(reference(128, traffic), answers)
    assert sum(a.host_tokens for a in answers) > 0


def test_disabled_cache_and_device_only(serve) -> None:  # noqa: ANN001
    with serve(128, *OURS, "--disable-radix-cache") as server:
        generate(server, prompt(1), 8)
        assert cached(generate(server, prompt(1), 8)) == {"device": 0, "host": 0}
    tlru = {"threshold": 128, "next_prompt_estimate": 64}
    policy = ["--radix-eviction-policy", "tlru", "--radix-eviction-policy-config", json.dumps(tlru)]
    with serve(128, *OURS, "--page-size", "16", "--enable-metrics", *policy) as server:
        generate(server, prompt(1), 8)
        assert cached(generate(server, prompt(1), 8)) == {"device": 288, "host": 0}
        assert re.search(r"retention +tlru", server.log.read_text())
        assert_counted(Scrape(settled(server)), {"device": 288}, 600, 16)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--enable-streaming-session"], {}, "--enable-streaming-session True is not"),
        pytest.param(
            ["--radix-eviction-policy-config", '{"protected_threshold": 4}'],
            {},
            "--radix-eviction-policy-config {'protected_threshold': 4} is not supported",
            marks=pytest.mark.full,
        ),
        ([], {"SGLANG_EXT_CHECKPOINT_TOKENS": "many"}, "SGLANG_EXT_CHECKPOINT_TOKENS='many'"),
        pytest.param(
            *([], {"SGLANG_EXT_SWA_HICACHE": "perhaps"}, "SGLANG_EXT_SWA_HICACHE='perhaps'"),
            marks=pytest.mark.full,
        ),
    ],
)
def test_an_unsupported_start_exits_with_a_message(
    model,  # noqa: ANN001
    tmp_path,  # noqa: ANN001
    zygote,  # noqa: ANN001
    options: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    arguments = ["--model-path", str(model(128)), *OURS, *HOST, *options]
    server = zygote.start(arguments, tmp_path / "log", {**CPU, **environment})
    assert server.process.wait() != 0
    log = server.log.read_text()
    assert f"sglang-ext: {message}" in log
    assert "Load weight begin" not in log, "refused only after the model was loaded"
    server.stop()


def test_copies_that_fail_here_stop_the_start(model, tmp_path, zygote) -> None:  # noqa: ANN001
    """The engine has none of this io backend for pages that lie together."""
    options = ["--max-total-tokens", "3072", "--hicache-io-backend", "kernel_ascend"]
    arguments = ["--model-path", str(model(128)), *OURS, *HOST, *options]
    server = zygote.start(arguments, tmp_path / "log", {**CPU, "SGLANG_EXT_COPIES": "engine"})
    assert server.process.wait() != 0
    said = "sglang-ext: --hicache-io-backend kernel_ascend, SGLANG_EXT_COPIES=engine: these copies"
    assert said in server.log.read_text()
    server.stop()


def test_text_only_llama_4_is_refused_by_name(tmp_path, zygote) -> None:  # noqa: ANN001
    """The engine keeps no pool of windows for it; said before any weights are read."""
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
    model = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **shape}
    (tmp_path / "config.json").write_text(json.dumps(model))
    options = ["--skip-tokenizer-init", "--attention-backend", "triton"]
    arguments = ["--model-path", str(tmp_path), *OURS, *HOST, *options]
    server = zygote.start(arguments, tmp_path / "log", CPU)
    assert server.process.wait() != 0
    log = server.log.read_text()
    assert "sglang-ext: --radix-cache-backend swa_hicache does not serve Llama4ForCausalLM" in log
    assert "Load weight begin" not in log
    server.stop()


def test_the_toggle_alone_selects_cache_and_host_tier(model, tmp_path, zygote) -> None:  # noqa: ANN001
    arguments = ["--model-path", str(model(128)), "--dtype", "float32"]
    arguments += ["--max-total-tokens", "2048", "--hicache-ratio", "2"]
    arguments += ["--mem-fraction-static", "0.5"]
    server = zygote.start(arguments, tmp_path / "log", {**CPU, "SGLANG_EXT_SWA_HICACHE": "1"})
    try:
        wait_until_ready(server)
        assert "impl=SwaHiCache" in server.log.read_text()
        assert "hicache_attached=True" in server.log.read_text()
    finally:
        server.kill()
