"""Pipeline stages on real servers: each has a cache of its own layers."""

import dataclasses
from collections.abc import Iterator

import pytest

from launch.models.tiny import make_model, parse_args
from launch.server import CPU, OURS, Server, free_ports
from launch.traffic import Traffic, generate
from tests.e2e.conftest import RANKS, assert_idle_and_alive, beside_no_cache
from tests.e2e.conversations import converse, differences
from tests.e2e.test_operations import prompt
from tests.e2e.test_server import cached
from tests.e2e.test_storage import flush

TRAFFIC = Traffic(conversations=6, rounds=4, seed=51)
HOST = (*OURS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
THREE = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}


def stages(count: int) -> list[str]:
    """Options of a server in so many stages."""
    return ["--pp-size", str(count), "--dist-init-addr", f"127.0.0.1:{free_ports(7)}"]


@pytest.fixture(scope="module")
def server(serve) -> Iterator[Server]:  # noqa: ANN001
    """Two stages with host memory, and more batches on their way than stages."""
    options = [*HOST, *stages(2), "--page-size", "16", "--chunked-prefill-size", "256"]
    options += ["--pp-max-micro-batch-size", "3", "--pp-async-batch-depth", "1"]
    with serve(128, *options, tokens=2048, **RANKS) as server:
        yield server


def test_stages_are_token_exact(server: Server, reference, full: bool) -> None:  # noqa: ANN001
    traffic = TRAFFIC if full else dataclasses.replace(TRAFFIC, rounds=3)
    answers = converse(server, traffic)
    assert not differences(answers, reference(128, traffic))
    assert sum(a.host_tokens for a in answers) > 0
    assert sum(a.device_tokens for a in answers) > 0
    assert_idle_and_alive(server)


def test_stages_flush_together(server: Server) -> None:
    first = generate(server, prompt(1), 8)
    flush(server)
    again = generate(server, prompt(1), 8)
    assert again["output_ids"] == first["output_ids"]
    assert cached(again) == {"device": 0, "host": 0}
    assert cached(generate(server, prompt(1), 8))["device"] > 0
    assert_idle_and_alive(server)


@pytest.mark.full
def test_three_stages(zygote, tmp_path) -> None:  # noqa: ANN001
    """Of two layers each."""
    model = tmp_path / "model"
    make_model(parse_args(["--out", str(model), "--window", "100", "--layers", "6"]))
    # each stage has a batch of its own under way, and the engine gives up a request that is alone
    # in its batch when the others have all there is
    tier = ["--chunked-prefill-size", "256", "--max-total-tokens", "2560", *stages(3)]
    answers, expected = beside_no_cache(zygote, model, tmp_path, TRAFFIC, 16, tier, **THREE)
    assert not differences(answers, expected)
    assert sum(a.host_tokens for a in answers) > 0


@pytest.mark.full
def test_unlike_stages_are_refused(tmp_path, zygote) -> None:  # noqa: ANN001
    """Three layers of four have windows: the first of two stages has no other."""
    out = tmp_path / "model"
    make_model(parse_args(["--out", str(out), "--window", "100", "--full-every", "4"]))
    arguments = ["--model-path", str(out), *HOST, *stages(2), "--max-total-tokens", "2048"]
    server = zygote.start(arguments, tmp_path / "log", {**CPU, **RANKS})
    assert server.process.wait() != 0
    assert "sglang-ext: --pp-size 2: the stages have unlike layers" in server.log.read_text()
    server.stop()


def test_storage_is_refused_with_stages(model, tmp_path, zygote) -> None:  # noqa: ANN001
    arguments = ["--model-path", str(model(128)), *HOST, "--pp-size", "2"]
    arguments += ["--hicache-storage-backend", "file"]
    server = zygote.start(arguments, tmp_path / "log", CPU)
    assert server.process.wait() != 0
    assert "sglang-ext: --hicache-storage-backend file is not" in server.log.read_text()
    server.stop()
