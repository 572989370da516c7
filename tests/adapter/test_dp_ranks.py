"""What a rank is to a storage, and calls that all DP ranks do or none."""

import asyncio
import threading
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.managers.io_struct import (
    AttachHiCacheStorageReqOutput,
    DetachHiCacheStorageReqOutput,
    FlushCacheReqOutput,
)

from sglang_ext.adapter import dp_ranks
from sglang_ext.adapter.storage_backend import storage_config, storage_labels

# ---- what a rank is ----------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "attention", "dp"),
    [((1, 2), (1, 2), 0), ((1, 2), (0, 1), 1), ((3, 4), (1, 2), 1)],
    ids=["tensor parallel", "each has whole pages", "both"],
)
def test_a_storage_knows_a_rank_by_its_part_of_a_page(
    monkeypatch: pytest.MonkeyPatch, tp: tuple[int, int], attention: tuple[int, int], dp: int
) -> None:
    parallel = SimpleNamespace(
        **dict(zip(("tp_rank", "tp_size"), tp, strict=True)),
        **dict(zip(("attn_tp_rank", "attn_tp_size"), attention, strict=True)),
        attn_dp_rank=dp,
        pp_rank=0,
        pp_size=1,
    )
    nothing = SimpleNamespace(extra_metric_labels=None)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(runtime_context, "get_observability", lambda: nothing)
    config = storage_config("model", {}, "page_first", metrics=False)
    assert (config.tp_rank, config.tp_size) == attention
    assert config.dp_rank == dp
    labels = storage_labels("file")
    assert (labels["tp_rank"], labels["dp_rank"]) == (attention[0], dp)


# ---- calls -------------------------------------------------------------------


class Scheduler:
    """A DP rank that is idle or not, and whose storage starts or not."""

    def __init__(self, *, idle: bool = True, starts: bool = True, attached: bool = False) -> None:
        self.idle, self.starts = idle, starts
        self.enable_hicache_storage = attached
        self.detached = 0

    @property
    def tree_cache(self) -> "Scheduler":
        return self

    @property
    def enable_storage(self) -> bool:
        return self.enable_hicache_storage

    def is_fully_idle(self) -> bool:
        return self.idle

    def attach(self, _: Any) -> AttachHiCacheStorageReqOutput:
        self.enable_hicache_storage |= self.starts
        return AttachHiCacheStorageReqOutput(success=self.starts, message="")

    def detach(self, _: Any) -> DetachHiCacheStorageReqOutput:
        self.enable_hicache_storage = False
        return DetachHiCacheStorageReqOutput(success=True)

    def detach_storage_backend(self) -> None:
        self.detached += 1


@pytest.fixture
def on_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a call on several DP ranks at once, which agree through a barrier."""
    context = types.SimpleNamespace(override=lambda *_, **__: None)
    monkeypatch.setattr(runtime_context, "get_context", lambda: context)

    def make(call: Any, original: Any, ranks: Sequence[Scheduler]) -> list[Any]:
        said: list[list[int]] = []
        rounds = threading.local()
        barrier = threading.Barrier(len(ranks), timeout=120.0)

        def everywhere(done: bool) -> bool:
            number = rounds.number = getattr(rounds, "number", -1) + 1
            while len(said) <= number:
                said.append([])
            said[number].append(done)
            barrier.wait()
            return all(said[number])

        monkeypatch.setattr(dp_ranks, "everywhere", everywhere)
        with ThreadPoolExecutor(len(ranks)) as threads:
            return list(threads.map(lambda rank: call(original, rank, None), ranks))

    return make


def test_an_attach_needs_all_ranks_idle(on_all: Any) -> None:
    ranks = [Scheduler(), Scheduler(idle=False)]
    answers = on_all(dp_ranks.attach, Scheduler.attach, ranks)
    assert not any(answer.success for answer in answers)
    assert all("not idle" in answer.message for answer in answers)
    assert not any(rank.enable_hicache_storage for rank in ranks)


def test_an_attach_that_fails_on_one_rank_is_undone_on_the_others(on_all: Any) -> None:
    ranks = [Scheduler(), Scheduler(starts=False)]
    answers = on_all(dp_ranks.attach, Scheduler.attach, ranks)
    assert not any(answer.success for answer in answers)
    assert [rank.detached for rank in ranks] == [1, 0]
    assert not any(rank.enable_hicache_storage for rank in ranks)


def test_what_was_attached_before_stays(on_all: Any) -> None:
    ranks = [Scheduler(attached=True), Scheduler(starts=False, attached=True)]
    on_all(dp_ranks.attach, Scheduler.attach, ranks)
    assert all(rank.enable_hicache_storage and not rank.detached for rank in ranks)


def test_a_detach_needs_all_ranks_idle(on_all: Any) -> None:
    ranks = [Scheduler(attached=True), Scheduler(idle=False, attached=True)]
    answers = on_all(dp_ranks.detach, Scheduler.detach, ranks)
    assert not any(answer.success for answer in answers)
    assert all(rank.enable_hicache_storage for rank in ranks)
    ranks[1].idle = True
    assert all(a.success for a in on_all(dp_ranks.detach, Scheduler.detach, ranks))
    assert not any(rank.enable_hicache_storage for rank in ranks)


@pytest.mark.parametrize("done", [(True, True), (True, False), (False, True)])
def test_a_flush_is_done_when_all_ranks_have(done: Sequence[bool]) -> None:
    class Tokenizer:
        mm_processor = None

        def auto_create_handle_loop(self) -> None:
            pass

        async def flush_cache_communicator(self, _: Any) -> list[FlushCacheReqOutput]:
            return [FlushCacheReqOutput(success=success) for success in done]

    assert asyncio.run(dp_ranks.flush_all(Tokenizer())).success == all(done)
