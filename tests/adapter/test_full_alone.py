"""Full attention alone: every page is a resume point. Models without a pool of windows, and V4.1
whose windows are computed again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_ext.adapter import factory, full_alone
from sglang_ext.adapter.byte_pages import ByteLayers, sizes_of
from sglang_ext.adapter.full_alone import NO_WINDOWS, FullAloneDevicePool
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL
from tests.adapter.deepseek_v4_traffic import PAGE, TALKS, conversations
from tests.fixtures.zygote import Zygote

TRAFFIC = "tests.adapter.deepseek_v4_traffic"


@pytest.mark.parametrize(
    "model",
    [
        "full-attention",
        "deepseek-v4.1",
        pytest.param("deepseek-v4.1-dspark", marks=pytest.mark.full),
    ],
)
def test_conversations_resume_at_every_page_of_every_tier(
    zygote: Zygote, tmp_path: Path, model: str
) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path), "--model", model, "--branches")
    first, second, branches = map(json.loads, printed[-3:])
    for server in (first, second):
        assert server["verified"] >= server["from_device"] + server["from_host"]
    for what in ("backed_up", "loaded", "demoted", "persisted"):
        assert first["counters"][f"{what}_pages"] > 0, what
    assert first["from_device"] > 0 < first["from_host"]
    assert second["counters"]["prefetched_pages"] > 0
    prompts = [prompt for prompt, _ in conversations(1)]
    assert second["from_host"] == sum((len(p) - 1) // PAGE * PAGE for p in prompts[-TALKS:])
    longest = max(map(len, prompts)) // PAGE * PAGE
    assert branches == list(range(longest, 0, -PAGE))


@pytest.mark.parametrize(
    ("model", "pool", "plane", "name"),
    [
        ("full-attention", 0, 1, "layer 0: V"),
        ("deepseek-v4.1", 0, 0, "layer 1: C1"),
        ("deepseek-v4.1", 2, 1, "layer 3: index"),
    ],
)
def test_a_plane_that_was_left_behind_is_found_by_its_name(
    zygote: Zygote, tmp_path: Path, model: str, pool: int, plane: int, name: str
) -> None:
    lost = ("--lose", str(pool), str(plane), "load")
    printed = zygote.lines(TRAFFIC, str(tmp_path), "--model", model, *lost)
    assert printed[-1].endswith(f', {name}"'), printed


def test_what_has_no_layers_has_a_place_on_the_host() -> None:
    row = (torch.zeros(4, 8, dtype=torch.uint8),)
    full, window = sizes_of([ByteLayers(FULL, "", (0,), (row,)), NO_WINDOWS])
    assert full == 8
    assert window > 0


class Allocator:
    """That of the engine, of 8 pages of 16 tokens; the first is padding."""

    device = "cpu"

    def __init__(self) -> None:
        self.free = list(range(1, 9))

    def available_size(self) -> int:
        return 16 * len(self.free)

    def alloc(self, tokens: int) -> torch.Tensor | None:
        if tokens > self.available_size():
            return None
        pages, self.free = self.free[: tokens // 16], self.free[tokens // 16 :]
        return (torch.tensor(pages).view(-1, 1) * 16 + torch.arange(16)).view(-1)

    def free_page_ids(self, pages: torch.Tensor) -> None:
        self.free += pages.tolist()


def test_windows_are_numbers_that_come_back() -> None:
    allocator: Any = Allocator()
    pool = FullAloneDevicePool(allocator, Geometry(16, 1), 8)
    before = pool.free_window_pages()
    tokens = allocator.alloc(3 * 16)
    full, numbers = pool.owned_slots(tokens, 0)
    assert torch.equal(pool.row_tokens(full, numbers), tokens)
    assert pool.free_window_pages() == before - 3
    pool.stays_with_request(full[1:])
    pool.stays_with_request(full[:0])
    assert pool.free_window_pages() == before - 1
    assert pool.free_pages() == 5, "the request has them"
    pool.release_window(full[:1], numbers[:1])
    pool.release(full[:1])
    assert pool.free_window_pages() == before
    assert pool.free_pages() == 6
    assert pool.allocate(7) is None
    assert pool.allocate_bound(1) is None


def context(page: int = 64, algorithm: str | None = None) -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool.__new__(MHATokenToKVPool)
    allocator = SimpleNamespace(get_kvcache=lambda: pool, size=512)
    params = SimpleNamespace(
        token_to_kv_pool_allocator=allocator, pp_cache_group=None, page_size=page
    )
    runner = SimpleNamespace(spec_algorithm=SpeculativeAlgorithm.from_string(algorithm))
    return SimpleNamespace(
        params=params,
        is_hybrid_ssm=False,
        is_hybrid_swa=False,
        tp_worker=SimpleNamespace(model_runner=runner),
    )


def test_one_pool_is_served() -> None:
    given = context()
    assert factory._served_pool(given) is given.params.token_to_kv_pool_allocator.get_kvcache()
    assert full_alone.is_pool(factory._served_pool(context(algorithm="NGRAM")))


def test_pages_that_are_parts_of_one_are_refused_with_what_to_use() -> None:
    with pytest.raises(StartupError, match=r"--page-size 1 is not supported .* --page-size 16 or"):
        factory._served_pool(context(page=1))


def test_drafts_with_kv_are_refused_with_what_to_use() -> None:
    with pytest.raises(StartupError, match=r"drafts with KV .* --speculative-algorithm NGRAM; or"):
        factory._served_pool(context(algorithm="EAGLE3"))


def test_states_of_recurrent_layers_are_refused_by_their_pool() -> None:
    given = context()
    given.is_hybrid_ssm = True
    with pytest.raises(StartupError, match="this model's pool is MHATokenToKVPool"):
        factory._served_pool(given)
