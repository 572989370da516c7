"""What a server exports, beside what its answers said."""

from collections.abc import Mapping

from sglang_ext.adapter.metric_definitions import METRICS, PREFIX, Cause, Kind
from tests.fixtures.queries import queries
from tests.fixtures.scrape import Scrape

PARTS = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}


def assert_all_is_there(scrape: Scrape, **labels: str) -> None:
    """Every documented metric, with these labels of the engine; and all that queries name."""
    for definition in METRICS:
        for part in PARTS.get(definition.kind, ("",)):
            has = scrape.labels.get(PREFIX + definition.name + part)
            assert has, f"{definition.name}{part} is not there"
            for label, values in {
                **definition.labels,
                **{k: (v,) for k, v in labels.items()},
            }.items():
                assert set(values) <= has[label], f"{definition.name} has no {label} {values}"
    faults = [fault for query in queries() for fault in scrape.faults(*query)]
    assert not faults, faults


def assert_counted(scrape: Scrape, tiers: Mapping[str, int], prompts: int, page: int) -> None:
    """What answers said, to within a page: of what was found in each tier, and of all prompts."""

    def found(tier: str) -> float:
        return scrape.total("hit_tokens_total", component="full", tier=tier)

    counted = {tier: found(tier) for tier in tiers}
    assert all(abs(counted[tier] - tiers[tier]) <= page for tier in tiers), (counted, tiers)
    computed = {cause: scrape.total("computed_tokens_total", cause=cause.value) for cause in Cause}
    # the engine's check of its health has a prompt of one token
    assert abs(sum(counted.values()) + sum(computed.values()) - prompts) <= page, computed
    windows = sum(
        scrape.total("hit_tokens_total", component="swa", tier=tier)
        for tier in ("device", "host", "storage")
    )
    assert 0 < windows <= sum(counted.values())
