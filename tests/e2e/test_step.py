"""Step-3.5: stock takes its sliding-window memory away when a host tier is on; ours does not."""

from pathlib import Path

from launch import step_model
from launch.server import CPU, OURS, STRICT_CHECKS, running
from launch.traffic import Traffic
from tests.e2e.conftest import COMMON, assert_idle_and_alive
from tests.e2e.conversations import converse, differences, hit_rates

TRAFFIC = Traffic(conversations=6, rounds=4, seed=5)


def test_the_host_tier_keeps_windows_and_is_token_exact(tmp_path: Path) -> None:
    model = step_model.make(tmp_path / "model", window=100)
    options = ["--model-path", str(model), *COMMON, "--page-size", "16"]
    environment = {**CPU, **STRICT_CHECKS}
    without = [*options, "--disable-radix-cache", "--max-total-tokens", "16384"]
    with running(without, tmp_path / "reference.log", environment) as server:
        expected = converse(server, TRAFFIC)
    tiered = [*options, *OURS, "--enable-hierarchical-cache", "--hicache-ratio", "2"]
    log = tmp_path / "ours.log"
    with running([*tiered, "--max-total-tokens", "2048"], log, environment) as server:
        answers = converse(server, TRAFFIC)
        assert_idle_and_alive(server)
    assert "swa_layer_tokens" in log.read_text()
    assert not differences(answers, expected)
    assert hit_rates(answers)["host_share"] > 0
