"""Requests, one at a time, through the calls that the engine's scheduler makes of its cache.

A request is matched, admitted, prefilled in chunks, decoded and released; nothing is computed.
What it would have decoded is allocated at once, all tokens of the answer but the last, which has
no KV in the engine either.
"""

import dataclasses
import time
from array import array
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from launch.bench.trace_caches import Cache
from sglang_ext.sizing.traffic import Tokens

_ANSWERS = 1 << 40
"""Tokens of answers that nobody knows are numbered downwards from here; the engine has no ids
below 0."""
_BUDGET = 16384
"""--max-prefill-tokens"""


@dataclasses.dataclass
class Counted:
    """Tokens where nothing else is said.

    Attributes:
        seconds: CPU time of everything that the scheduler did, copies and checks apart.
        verified: read before a chunk, and compared.
        rejected: requests that did not fit.
    """

    requests: int = 0
    prompt: int = 0
    from_device: int = 0
    from_host: int = 0
    rejected: int = 0
    verified: int = 0
    seconds: float = 0.0


class Batch:
    """What ``alloc_for_extend`` reads of a ScheduleBatch with one request."""

    device = "cpu"
    hisparse_coordinator = None

    def __init__(self, cache: Cache, req: Req) -> None:
        self.req_to_token_pool = cache.rows
        self.tree_cache = cache.tree
        self.token_to_kv_pool_allocator = cache.allocator
        self.reqs = [req]
        self.prefix_lens = [req.prefix_len]
        self.extend_lens = [req.extend_len]
        self.extend_num_tokens = req.extend_len
        self.seq_lens = self.seq_lens_cpu = torch.tensor([req.extend_end])

    def is_dllm(self) -> bool:
        """Whether the model is one of diffusion."""
        return False

    def maybe_evict_swa(self) -> None:
        """Nothing, where prefixes are shared."""


class WrittenKv(Protocol):
    """KV that tells what it is of."""

    def write(self, req: Req, start: int, tokens: "array[int]") -> None:
        """What a forward pass leaves behind: KV of these tokens, the first at ``start``."""
        ...

    def compare(self, req: Req) -> None:
        """What a forward pass reads of the tokens before those that it computes.

        Raises:
            AssertionError: a row is of another token, or not there.
        """
        ...


class Scheduler:
    """Serves requests from a cache.

    Args:
        kv: is written when it would be computed, and compared whenever it is found.
    """

    def __init__(self, cache: Cache, kv: WrittenKv | None = None) -> None:
        self.counted = Counted()
        self._cache = cache
        self._kv = kv
        self._aside = 0.0

    def count_from_here(self) -> None:
        """What was before is forgotten."""
        self.counted = Counted()
        self._cache.times.clear()
        self._cache.copies.clear()

    def serve(self, prompt: Tokens, answer: Tokens) -> None:
        """One request from its arrival to its end.

        Raises:
            AssertionError: KV that was found is not that of its tokens.
        """
        ids = array("q", prompt.tobytes())
        out = array("q", np.where(answer < 0, _ANSWERS + answer, answer).tobytes())
        times, counted = self._cache.times, self.counted
        times.request = counted.requests
        counted.requests += 1
        counted.prompt += len(ids)
        start, copies, self._aside = time.process_time(), times.copies, 0.0
        sampling = SamplingParams(temperature=0, max_new_tokens=len(out))
        req = Req(str(times.request), "", ids, sampling)
        if self._prefill(req):
            self._decode(req, out[:-1])
            req.output_ids = out
            req.finished_reason = FINISH_LENGTH(len(out))
            release_kv_cache(req, self._cache.tree, checkpoint=True)
            self._flush()
        spent = time.process_time() - start
        counted.seconds += spent - (times.copies - copies) - self._aside

    def _prefill(self, req: Req) -> bool:
        """All chunks of a prompt; False if it does not fit."""
        tree = self._cache.tree
        self._events()
        adder = self._adder()
        req.init_next_round_input(tree)
        on_device = req.prefix_len
        adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None)
        if not adder.can_run_list:
            self.counted.rejected += 1
            return False
        self.counted.from_device += on_device
        self.counted.from_host += req.prefix_len - on_device
        chunked = adder.new_chunked_req
        self._extend(req)
        while chunked is not None:
            self._flush()
            self._events()
            checkpoint_kv_cache(req, tree)
            adder = self._adder()
            req.init_next_round_input()
            chunked = adder.add_chunked_req(req)
            assert adder.can_run_list, "a chunk of an admitted request does not fit"
            self._extend(req)
        return True

    def _adder(self) -> Any:
        cache = self._cache
        return PrefillAdder(
            cache.sizes.page, cache.tree, cache.allocator, None, 1.0, _BUDGET, cache.sizes.chunk
        )

    def _extend(self, req: Req) -> None:
        """What comes before a forward pass, and what the pass would write."""
        cache = self._cache
        if cache.has_host:
            cache.tree.ready_to_load_host_cache()
        allocation.alloc_for_extend(Batch(cache, req))
        self._look(lambda kv: self._compare(kv, req))

    def _compare(self, kv: WrittenKv, req: Req) -> None:
        kv.compare(req)
        self.counted.verified += req.prefix_len
        found, stop = req.prefix_len, req.extend_end
        kv.write(req, found, req.origin_input_ids[found:stop])

    def _look(self, use: Callable[[WrittenKv], None]) -> None:
        """Use the KV, if it is verified; that takes no time of the scheduler's."""
        if self._kv is not None:
            start = time.process_time()
            use(self._kv)
            self._aside += time.process_time() - start

    def _decode(self, req: Req, tokens: "array[int]") -> None:
        """Slots of these tokens, behind the prompt, and the window that slides over them."""
        if not tokens:
            return
        cache = self._cache
        checkpoint_kv_cache(req, cache.tree)
        self._flush()
        self._events()
        start = len(req.origin_input_ids)
        stop = start + len(tokens)
        row = cache.rows.req_to_token[req.kv.req_pool_idx]
        if cache.sizes.page == 1:
            slots = allocation.alloc_token_slots(cache.tree, len(tokens))
        else:
            first, last = torch.tensor([start]), torch.tensor([stop])
            slots = allocation.alloc_paged_token_slots_extend(
                cache.tree, first, first, last, last, row[start - 1 : start].long(), len(tokens)
            )
        cache.rows.write((req.kv.req_pool_idx, slice(start, stop)), slots.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = stop
        self._look(lambda kv: kv.write(req, start, tokens))
        cache.tree.evict_sliding_windows(req, stop - 1)

    def _events(self) -> None:
        if self._cache.has_host:
            self._cache.tree.check_hicache_events()

    def _flush(self) -> None:
        if self._cache.has_host:
            self._cache.tree.flush_pending_backups()


class WrittenIds:
    """WrittenKv that names its tokens: the beginning of a row of K is the id."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._full, self._window = (
            pool.k_buffer[0].flatten(1).view(torch.int64)[:, 0]
            for pool in (cache.pool.full_kv_pool, cache.pool.swa_kv_pool)
        )

    def write(self, req: Req, start: int, tokens: "array[int]") -> None:
        """See WrittenKv."""
        row, peers = self._row(req, start + len(tokens))
        ids = torch.frombuffer(tokens, dtype=torch.int64)
        self._full[row[start:]] = ids
        self._window[peers[start:]] = ids

    def compare(self, req: Req) -> None:
        """See WrittenKv."""
        found = req.prefix_len
        row, peers = self._row(req, found)
        ids = torch.frombuffer(req.origin_input_ids, dtype=torch.int64)[:found]
        first = max(0, found - (self._cache.sizes.model.shape.window - 1))
        told = f"request {req.rid}, resumed after {found} tokens"
        assert torch.equal(self._full[row], ids), f"{told}: full attention"
        assert (peers[first:] > 0).all(), f"{told}: the window is not there"
        assert torch.equal(self._window[peers[first:]], ids[first:]), f"{told}: the window"

    def _row(self, req: Req, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Full-attention and sliding-window slots of a request's first tokens."""
        row = self._cache.rows.req_to_token[req.kv.req_pool_idx][:stop].long()
        return row, self._cache.allocator.full_to_swa_index_mapping[row]
