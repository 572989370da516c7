"""What a server says at start about its memory."""

import dataclasses
import logging

import pytest

from sglang_ext.adapter.host_arena import only_ours_says_how_much
from sglang_ext.adapter.start_plan import StartPlan
from tests.planning.test_host_plan import host_plan


def test_the_table_has_every_decision() -> None:
    plan = StartPlan(
        host=dataclasses.replace(host_plan(), bytes=200 * 10**9),
        ranks=2,
        policies=("write_back", "slru (--radix-eviction-policy slru)"),
        copies="engine, --hicache-io-backend kernel; tried at start: 20.0 GB/s to the host",
        storage="file, /pages, at most 1.00 GB a rank; identity abc",
    )
    _, *rows = plan.table().splitlines()
    said = {row[:16].strip(): row[16:].strip() for row in rows}
    assert said["host memory"].startswith(
        "200.00 GB a rank (--hicache-size 0.01), 400.00 GB on all"
    )
    assert said["write policy"] == "write_back"
    assert said["retention"] == "slru (--radix-eviction-policy slru)"
    assert said["copies"].endswith("20.0 GB/s to the host")
    assert said["storage"] == "file, /pages, at most 1.00 GB a rank; identity abc"
    assert len({row.index(said[row[:16].strip()]) for row in rows}) == 1, "one column"
    assert "none" in dataclasses.replace(plan, storage=None).table().splitlines()[-1]
    device = dataclasses.replace(plan, host=None).table()
    assert "--enable-hierarchical-cache" in device
    assert "GB" not in device


def test_the_engine_does_not_say_it_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Its pools are views of one memory; other lines of theirs stay."""
    logger = logging.getLogger("a pool of the engine")
    with caplog.at_level(logging.INFO), only_ours_says_how_much(logger):
        logger.info("Allocating %s hierarchical KV host pool: %d tokens, %.2f GB", "full", 1, 2.0)
        logger.info("something else")
    logger.info("Allocating more")
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "something else"
    assert not logger.filters
