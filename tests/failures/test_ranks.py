"""Catalogue 2F: ranks that share their prompts hold the same table."""

import datetime
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from sglang_ext.testing.transfers import Pace
from tests.failures.scenarios import ALL, PAGE, Tokens, check_all, find, prompt, run

WORLD, STEPS = 4, 6


def two_ranks(**sizes: int) -> list[SimEngine]:
    """The same sizes; copies end at different times."""
    wanted = {"host_pages": 24, "host_window_pages": 12, "pinned_share": 1, "low_share": 2}
    return [
        SimEngine(Geometry(PAGE, 32), Sizes(24, 24, **{**wanted, **sizes}), Pace(3.0), seed)
        for seed in (1, 2)
    ]


def step(ranks: list[SimEngine], duration: float = 1.0) -> None:
    """A scheduler step: the minimum of all reports is what all ranks commit."""
    for rank in ranks:
        rank.pass_time(duration)
    agreed = [min(values) for values in zip(*(rank.report() for rank in ranks), strict=True)]
    for rank in ranks:
        rank.ledger.commit(agreed)
        rank.demote()
    assert len({rank.fingerprint() for rank in ranks}) == 1, "the ranks hold different tables"


def serve_on(ranks: list[SimEngine], tokens: Tokens) -> None:
    for rank in ranks:
        rank.finish(run(rank, tokens, chunk=2 * PAGE))


def finish_all(ranks: list[SimEngine]) -> None:
    while any(rank.index.pending[kind] for rank in ranks for kind in TransferKind):
        step(ranks, 100.0)
    for rank in ranks:
        check_all(rank, idle=True)


@pytest.mark.parametrize("pool", ["host", "host_window"])
def test_an_allocation_that_fails_on_one_rank_fails_the_operation_on_both(pool: str) -> None:
    """F2: agreement is on operations, not on how many of them. The host has room for two
    prompts: what one rank could not allocate is taken for used on both."""
    ranks = two_ranks(host_pages=8, low_share=1000)
    serve_on(ranks, prompt(4, seed=1))
    finish_all(ranks)
    getattr(ranks[1], pool).allocations_to_fail = 1
    serve_on(ranks, prompt(4, seed=2))
    serve_on(ranks, prompt(4, seed=3))
    for _ in range(3):
        step(ranks)
    finish_all(ranks)
    counters = [rank.index.counters for rank in ranks]
    assert counters[0] == counters[1]
    assert counters[0].failed_transfers == 1
    assert ranks[0].host.free_pages() == ranks[1].host.free_pages()
    assert ranks[0].host_window.free_pages() == ranks[1].host_window.free_pages()
    for rank in ranks:
        rank.index.evict_device(ALL, ALL)
    assert [len(find(rank, prompt(4, seed=1)).rows) for rank in ranks] == [4, 4]


def test_a_copy_that_is_slow_on_one_rank_is_published_on_none() -> None:
    """F2: the other rank reports it as ended in every step."""
    ranks = two_ranks()
    serve_on(ranks, prompt(4))
    ranks[0].copy(TransferKind.BACKUP)
    for _ in range(3):
        step(ranks, 0.0)
        assert not any(rank.index.table.host.ready.any() for rank in ranks)
    ranks[1].copy(TransferKind.BACKUP)
    step(ranks, 0.0)
    assert all(rank.index.table.host.ready.any() for rank in ranks)
    finish_all(ranks)


def reports(rank: int) -> list[list[int]]:
    """What a rank reports in each step; another one is the slowest each time."""
    return [[step if rank == step % WORLD else step + 10, -rank, rank] for step in range(STEPS)]


def on_each_rank(rank: int, folder: str) -> None:
    """Four processes, as the 2 x 2 product of two kinds of groups."""
    folder_path = Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder_path / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=180),
    )
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    agreement = RankAgreement([rows[rank // 2], None, columns[rank % 2]])
    for number, report in enumerate(reports(rank)):
        agreed = agreement.minimum(report)
        # rank 0 alone, rank 3 alone, ... is behind: one group does not see all of them
        assert agreed == [number, 1 - WORLD, 0], (rank, number, agreed)
    dist.barrier()
    dist.destroy_process_group()
    (folder_path / f"ended-{rank}").touch()


def test_the_minimum_over_two_groups_is_the_minimum_over_their_product(tmp_path: Path) -> None:
    """F1, F3, F4: real processes; in each step another rank is behind, and none waits."""
    # forked: a fresh interpreter would import torch once more for each rank
    mp.start_processes(on_each_rank, args=(str(tmp_path),), nprocs=WORLD, start_method="fork")
    assert len(list(tmp_path.glob("ended-*"))) == WORLD
