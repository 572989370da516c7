"""A model without full-attention layers: stock has no host tier for it, ours has."""

from pathlib import Path

from launch.bench.metrics import settled
from launch.models.tiny import make_model, parse_args
from launch.traffic import Traffic
from tests.e2e.conftest import beside_no_cache
from tests.e2e.conversations import differences, hit_rates
from tests.e2e.exported import assert_counted
from tests.fixtures.scrape import Scrape
from tests.fixtures.zygote import Zygote

TRAFFIC = Traffic(conversations=6, rounds=4, seed=7)
# The rows of requests name what the window has left behind, with stock's cache too. That check
# is for pools in which such an index is still allocated.
CHECKS = {"SGLANG_CHECK_KV_PAGE_INVARIANTS": "0"}


def test_windows_alone_are_kept_and_tokens_are_exact(zygote: Zygote, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(parse_args(["--out", str(model), "--window", "100", "--full-every", "99"]))
    tier = ["--chunked-prefill-size", "256", "--max-total-tokens", "1024", "--enable-metrics"]
    scrapes: list[Scrape] = []
    # the engine's allocator for such models has pages of one token
    answers, expected = beside_no_cache(
        zygote,
        model,
        tmp_path,
        TRAFFIC,
        1,
        tier,
        look=lambda server: scrapes.append(Scrape(settled(server))),
        **CHECKS,
    )
    assert not differences(answers, expected)
    scrape = scrapes[0]
    found = {
        tier: sum(getattr(a, f"{tier}_tokens") for a in answers) for tier in ("device", "host")
    }
    assert_counted(scrape, found, sum(a.prompt_tokens for a in answers), 16)
    assert scrape.total("kv_bytes", component="full") == 0
    assert scrape.total("kv_bytes", component="swa", tier="host") > 0
    assert scrape.total("transfer_bytes_sum", direction="load") > 0
    rates = hit_rates(answers)
    assert rates["hit_rate"] >= 0.6, rates
    assert rates["host_share"] > 0.1, rates
