"""Step-3.5: stock takes its sliding-window memory away when a host tier is on; ours does not."""

from pathlib import Path

from launch.models import step as step_model
from launch.traffic import Traffic
from tests.e2e.conftest import beside_no_cache
from tests.e2e.conversations import differences, hit_rates
from tests.fixtures.zygote import Zygote

TRAFFIC = Traffic(conversations=6, rounds=4, seed=5)


def test_the_host_tier_keeps_windows_and_is_token_exact(zygote: Zygote, tmp_path: Path) -> None:
    model = step_model.make(tmp_path / "model", window=100)
    tier = ["--max-total-tokens", "2048"]
    answers, expected = beside_no_cache(zygote, model, tmp_path, TRAFFIC, 16, tier)
    assert "swa_layer_tokens" in (tmp_path / "ours.log").read_text()
    assert not differences(answers, expected)
    assert hit_rates(answers)["host_share"] > 0
