"""A model without a pool of windows: pages of full attention, and a resume at each of them."""

from pathlib import Path

import pytest

from launch.bench.metrics import settled
from launch.models.qwen3 import make
from launch.traffic import Traffic
from tests.e2e.conftest import RANKS, beside_no_cache
from tests.e2e.conversations import differences, hit_rates
from tests.e2e.exported import assert_counted
from tests.fixtures.scrape import Scrape
from tests.fixtures.zygote import Zygote

TRAFFIC = Traffic(conversations=6, rounds=4, seed=7)


@pytest.mark.parametrize(("page", "ranks"), [(64, 1), pytest.param(16, 2, marks=pytest.mark.full)])
def test_tokens_are_exact_with_hits_on_the_host(
    zygote: Zygote, tmp_path: Path, page: int, ranks: int
) -> None:
    model = make(tmp_path / "model")
    tier = ["--chunked-prefill-size", "256", "--max-total-tokens", "1536", "--enable-metrics"]
    both = ("--tp", str(ranks)) if ranks > 1 else ()
    scrapes: list[Scrape] = []
    answers, expected = beside_no_cache(
        zygote, model, tmp_path, TRAFFIC, page, tier, both=both,
        look=lambda server: scrapes.append(Scrape(settled(server))),
        **(RANKS if ranks > 1 else {}),
    )  # fmt: skip
    assert not differences(answers, expected)
    scrape = scrapes[0]
    found = {
        tier: sum(getattr(a, f"{tier}_tokens") for a in answers) for tier in ("device", "host")
    }
    if ranks == 1:  # each rank counts
        assert_counted(scrape, found, sum(a.prompt_tokens for a in answers), page)
    assert scrape.total("kv_bytes", component="full", tier="host") > 0
    assert scrape.total("transfer_bytes_sum", direction="load") > 0
    rates = hit_rates(answers)
    assert rates["hit_rate"] >= 0.5, rates
    assert rates["host_share"] > 0.1, rates
