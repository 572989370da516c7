"""Requests that resume and end inside a table page, over the engine's own pools and allocators:
every pass reads the KV of its own tokens, found to the token, and no slot is lost."""

import itertools
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.device_pool import EngineDevicePool
from sglang_ext.adapter.drafts import layers
from sglang_ext.adapter.inside import InsidePages
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.table.geometry import Geometry

WINDOW, LONGEST = 40, 400
Tokens = list[int]


class Engine:
    """What the engine does with a cache for one request after another, on pages of one token.

    Args:
        overlap: KV of a position is of so many tokens behind it as well, as drafts have it.
    """

    def __init__(self, tokens: int = 1024, overlap: int = 0) -> None:
        geometry = Geometry(1, WINDOW, overlap=overlap)
        self.overlap = overlap
        self.pool = SWAKVPool(
            size=tokens,
            size_swa=tokens,
            page_size=1,
            dtype=torch.float32,
            head_num=1,
            head_dim=2,
            swa_attention_layer_ids=[0, 2],
            full_attention_layer_ids=[1, 3],
            device="cpu",
        )
        self.allocator = SWATokenToKVPoolAllocator(
            tokens, tokens, 1, torch.float32, "cpu", self.pool, need_sort=False
        )
        self.size = tokens
        self.rows = ReqToTokenPool(4, LONGEST, "cpu", enable_memory_saver=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            sliding_window_size=WINDOW,
        )
        # a draft of both kinds of layers, and of a shape of its own
        self.draft = SWAKVPool(
            size=tokens,
            size_swa=tokens,
            page_size=1,
            dtype=torch.float32,
            head_num=1,
            head_dim=1,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            device="cpu",
        )
        params.sidecar_draft_device_pools = (self.draft,)
        device_pool = EngineDevicePool(self.allocator, geometry, drafts=layers(params))
        self.index = PrefixCache(geometry, tokens // geometry.page_tokens, device_pool)
        admission = Admission(1 << 30, geometry.retained_tokens, 1, None)
        inside = InsidePages(self.index, device_pool, None)
        self.cache = SwaHiCache(params, self.index, device_pool, admission, inside=inside)

    def start(self, prompt: Tokens, number: int = 0) -> Any:
        """Match and lock a prompt; its row names what was found."""
        req = SimpleNamespace(
            rid=f"{number}-{len(prompt)}",
            kv=ReqKvInfo(req_pool_idx=number),
            full_untruncated_fill_ids=array("q", prompt),
            origin_input_ids=array("q", prompt),
            extra_key=None,
            cache_salt=None,
            finished=lambda: False,
            is_finished=False,
            tokens=list(prompt),
            computed=0,
        )
        key = RadixKey(req.full_untruncated_fill_ids, limit=len(prompt) - 1)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        req.last_node, req.found = found.last_device_node, found.device_prefix_len
        req.kv.cache_protected_len = req.computed = req.found
        req.lock = self.cache.lock(req.last_node)
        row = self.rows.req_to_token[number]
        row[: req.found] = self.cache.path_device_indices(req.last_node)[: req.found]
        return req

    def extend(self, req: Any, tokens: Tokens = ()) -> None:
        """Compute what a request has not computed yet, and then so much more."""
        req.tokens += tokens
        req.full_untruncated_fill_ids = array("q", req.tokens)
        start, stop = req.computed, len(req.tokens)
        missing = stop - start - self.allocator.full_available_size()
        windows = stop - start - self.allocator.swa_available_size()
        if max(missing, windows) > 0:
            self.cache.evict(EvictParams(max(0, missing), max(0, windows)))
        slots = self.allocator.alloc(stop - start)
        assert slots is not None
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        row[start:stop] = slots
        if start:  # the last position gets its KV of the token behind it
            start -= min(self.overlap, start - req.kv.cache_protected_len)
            slots = row[start:stop].long()
        peers = self.allocator.full_to_swa_index_mapping[slots]
        for pool, where in self.places(slots, peers):
            for layer, (k, v) in enumerate(zip(pool.k_buffer, pool.v_buffer, strict=True)):
                kv = self.kv_of(req.tokens, layer)[start:stop]
                k[where, 0, 0], v[where, 0, 0] = kv, -kv
        req.computed = req.kv.kv_allocated_len = req.kv.kv_committed_len = stop
        self.check_reads(req)

    def places(self, full: torch.Tensor, swa: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
        """Pools of the model and of the draft, with slots that tokens have there."""
        for hybrid in (self.pool, self.draft):
            yield hybrid.full_kv_pool, full
            yield hybrid.swa_kv_pool, swa

    def kv_of(self, tokens: Tokens, layer: int) -> torch.Tensor:
        """What a layer has of each token: depends on all before it."""
        value, values = float(layer), []
        # the last token has none behind it yet
        for token, behind in itertools.zip_longest(tokens, tokens[self.overlap :], fillvalue=0):
            value = (value * 31 + token + 1) % 65521
            values.append((value + behind * self.overlap) % 65521)
        return torch.tensor(values)

    def check_reads(self, req: Any) -> None:
        """All full-attention KV of a request, and its window, is of its own tokens."""
        row = self.rows.req_to_token[req.kv.req_pool_idx][: req.computed].long()
        peers = self.allocator.full_to_swa_index_mapping[row]
        for pool, where in self.places(row, peers):
            first = 0 if where is row else max(0, req.computed - WINDOW)
            for layer, (k, v) in enumerate(zip(pool.k_buffer, pool.v_buffer, strict=True)):
                named = slice(first, req.computed - self.overlap)
                kv = self.kv_of(req.tokens, layer)[named]
                assert (where[first:] > 0).all()
                assert torch.equal(k[where[named], 0, 0], kv)
                assert torch.equal(v[where[named], 0, 0], -kv)

    def finish(self, req: Any) -> None:
        """What the engine does when a request has ended; no slot is lost."""
        req.finished = lambda: True
        self.cache.checkpoint(req, up_to=req.computed)
        self.abort(req)

    def abort(self, req: Any) -> None:
        """The same without what was computed."""
        self.cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, req.computed)])
        self.cache.unlock(req.lock)

    def check_idle(self) -> None:
        """All slots are free or the cache's."""
        cache, allocator = self.cache, self.allocator
        cache.sanity_check()
        assert cache.full_protected_size() == cache.swa_protected_size() == 0
        assert allocator.full_available_size() + cache.full_evictable_size() == self.size
        assert allocator.swa_available_size() + cache.swa_evictable_size() == self.size

    def serve(self, prompt: Tokens, answer: Tokens = ()) -> int:
        """A request from start to finish; returns how many of its tokens were found."""
        req = self.start(prompt)
        self.extend(req)
        self.cache.checkpoint(req, up_to=req.computed)
        self.check_reads(req)
        for token in answer:
            self.extend(req, [token])
            self.cache.evict_sliding_windows(req, req.computed)
        self.finish(req)
        self.check_idle()
        return int(req.found)


def words(count: int, seed: int = 0) -> Tokens:
    """So many tokens."""
    found: Tokens = np.random.default_rng(seed).integers(1, 1000, count).tolist()
    return found


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("turn", [1, 9, 16, 37])
def test_a_conversation_is_found_to_its_last_token(turn: int, overlap: int) -> None:
    """With drafts, to the last position whose next token was known."""
    engine = Engine(overlap=overlap)
    conversation, length = words(21), 0
    for number in range(4):
        answer = words(turn, number + 100)
        assert engine.serve(conversation, answer) == max(0, length - overlap)
        conversation += answer
        length = len(conversation)
        conversation += words(5, number + 200)
    assert engine.index.counters.copied_inside == 0


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("cut", [1, 15, 18, 40, 63, 79])
def test_branches_copy_what_they_share_of_a_page(cut: int, overlap: int) -> None:
    engine = Engine(overlap=overlap)
    shared = words(80)
    engine.serve(shared)
    for seed in range(1, 6):
        assert engine.serve(shared[:cut] + words(20, seed), words(3, seed)) == cut - overlap
    assert (engine.index.counters.copied_inside > 0) is (cut > overlap)


def test_two_that_run_at_once_go_on_in_one_tail() -> None:
    engine = Engine()
    start = words(40)
    engine.serve(start)
    requests = [engine.start(start + words(30, seed), seed) for seed in (1, 2)]
    for req in requests:
        engine.extend(req)
    for req in requests:
        engine.cache.checkpoint(req, up_to=req.computed)
        engine.check_reads(req)
    for req in requests:
        engine.extend(req, words(9, 3))
    for req in requests:
        engine.finish(req)
    engine.check_idle()
    assert [req.found for req in requests] == [40, 40]
    for req in requests:
        assert engine.serve([*req.tokens, 7]) == 79


def test_an_aborted_request_leaves_the_page_that_it_resumed_inside() -> None:
    engine = Engine()
    start = words(40)
    engine.serve(start)
    req = engine.start(start + words(20, 1))
    engine.extend(req)
    engine.abort(req)
    engine.check_idle()
    assert engine.serve([*start, 7]) == 40


@pytest.mark.parametrize("overlap", [0, 1])
def test_small_pools_cost_hits_and_nothing_else(overlap: int) -> None:
    """Tails and pages of their own find no room, or take it from others."""
    rng = np.random.default_rng(5)
    engine = Engine(tokens=160, overlap=overlap)
    histories = [words(20 + seed, seed) for seed in range(4)]
    found = 0
    for number in range(40):
        which = int(rng.integers(4))
        cut = int(rng.integers(1, len(histories[which]) + 1))
        prompt = histories[which][: cut if rng.random() < 0.4 else None]
        prompt = (prompt + words(int(rng.integers(1, 20)), number))[:110]
        found += engine.serve(prompt, words(int(rng.integers(1, 24)), number + 1000))
        histories[which] = prompt
    assert found > 0
    assert engine.index.counters.copied_inside > 0


def test_a_request_without_room_for_a_tail_gives_back_what_it_shared_of_a_page() -> None:
    """The engine has counted that part as left by the window, when it was the cache's."""
    engine = Engine(tokens=192)
    shared = words(112)
    engine.serve(shared)
    req, other = engine.start([*shared[:105], 1, 2, 3]), engine.start([*shared, 7], 1)
    engine.extend(req)
    engine.cache.evict_sliding_windows(req, req.computed)
    large = engine.start(words(60, 1), 2)
    engine.extend(large)  # leaves a page for what is shared, and none for a tail
    engine.finish(req)
    assert engine.index.counters.copied_inside == 1
    engine.abort(other)
    engine.abort(large)
    engine.check_idle()
    assert engine.serve([*req.tokens, 7]) == 105


def test_a_flush_forgets_how_often_pages_came_and_went() -> None:
    """The table is another one after it: nothing may go on with parts of the old one."""
    engine = Engine(tokens=160)
    for seed in range(6):
        engine.serve(words(100, seed))
    engine.cache.reset()
    engine.allocator.clear()
    shared = words(60)
    engine.serve(shared)
    assert engine.serve([*shared, 7]) == 60


def test_the_kv_of_a_draft_that_stays_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(overlap=1)
    moves = MHATokenToKVPool.move_kv_cache

    def without_drafts(pool: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        if pool not in (draft.full_kv_pool, draft.swa_kv_pool):
            moves(pool, target, source)

    draft = engine.draft
    monkeypatch.setattr(MHATokenToKVPool, "move_kv_cache", without_drafts)
    shared = words(80)
    engine.serve(shared)
    with pytest.raises(AssertionError):
        engine.serve(shared[:40] + words(20, 1))
