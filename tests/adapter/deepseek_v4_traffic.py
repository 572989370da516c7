"""A child process of test_deepseek_v4: conversations through our cache over the engine's pools.

The pools, the allocator, what reads them and the calls of the scheduler are the engine's; the cache
is what our factory builds, with its threads that copy and its storage in files. In place of the
model stands what a forward pass leaves behind: every token's row in every plane names the whole
prefix, and a request compares what it reads, layer by layer, through the engine's getters.

Prints one line of JSON for each of two servers, one after the other, on the same storage; then what
was said when a row was of another prefix.

    python -m tests.adapter.deepseek_v4_traffic DIRECTORY [BUG]
"""

import dataclasses
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from launch.bench.call_times import CallTimes
from launch.bench.trace_requests import Scheduler
from sglang_ext.adapter import factory
from sglang_ext.adapter.byte_pages import ByteHost
from tests.adapter.deepseek_v4 import PAGE, RATIOS, WINDOW_TOKENS, device_pool, set_options
from tests.adapter.test_identity import write_model

PAGES, WINDOW_PAGES, LONGEST = 24, 12, 20 * PAGE
TALKS, TURNS, CHUNK = 8, 7, 4 * PAGE
RING = 8
"""States of C4 of a page."""
_SEED = 20
_ALONE = {
    **dict.fromkeys(("attn_tp_rank", "attn_dp_rank", "pp_rank"), 0),
    **dict.fromkeys(("attn_tp_size", "pp_size"), 1),
}
"""A server of one rank."""


class Served:
    """The cache of a scheduler: what ``launch.bench.trace_requests`` needs of one."""

    has_host = True

    def __init__(self, storage: Path) -> None:
        self.sizes = SimpleNamespace(page=PAGE, chunk=CHUNK)
        self.times = CallTimes()
        set_options(
            hicache_size=0.03,
            chunked_prefill_size=CHUNK,
            hicache_storage_backend="file",
            hicache_storage_backend_extra_config=json.dumps({"file_storage_path": str(storage)}),
            hicache_storage_prefetch_policy="wait_complete",
        )
        get_context().override("test", model_path=str(storage.parent / "model"))
        get_parallel().override_permanently(**_ALONE)
        self.pool = device_pool(PAGES * PAGE, WINDOW_PAGES * PAGE)
        self.allocator = SWATokenToKVPoolAllocator(
            PAGES * PAGE, WINDOW_PAGES * PAGE, PAGE, torch.uint8, "cpu", self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(2, LONGEST + PAGE, "cpu", enable_memory_saver=False)
        runner = SimpleNamespace(
            prefill_aware_swa=False,
            forward_stream=None,
            lora_manager=None,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        context: Any = SimpleNamespace(
            disable_radix_cache=False,
            params=CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                chunked_prefill_size=CHUNK,
                sliding_window_size=WINDOW_TOKENS,
            ),
            full_tokens_per_layer=PAGES * PAGE,
            is_hybrid_swa=True,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=True,
            tp_worker=SimpleNamespace(
                model_runner=runner, register_hicache_layer_transfer_counter=lambda _: None
            ),
            tp_size=1,
            tp_rank=0,
        )
        self.tree: Any = factory.build_tree_cache(context)
        # as a worker does before its forward pass
        start_loads = self.tree.ready_to_load_host_cache
        counter = self.tree.cache_controller.layer_done_counter

        def start() -> int:
            index = int(start_loads())
            counter.set_consumer(index)
            return index

        self.tree.ready_to_load_host_cache = start

    def wait_for_storage(self, name: str, prompt: np.ndarray) -> None:
        """A request gets in line, and waits for what is read for it."""
        tree = self.tree
        tree.prefetch_from_storage(
            name, tree.root_node_handle(), prompt.tolist(),
            matched_prefix_tokens=[], extra_key=None, cache_salt=None,
        )  # fmt: skip
        while not tree.check_prefetch_progress(name):
            tree.check_hicache_events()

    def settle(self) -> None:
        """Until nothing is in flight or on its way to storage."""
        while self.tree.in_flight or self.tree.ongoing_backup:
            self.tree.check_hicache_events()

    def close(self) -> None:
        """A server ends."""
        self.settle()
        self.tree.sanity_check()
        full = self.allocator.full_available_size() + self.tree.full_evictable_size()
        window = self.allocator.swa_available_size() + self.tree.swa_evictable_size()
        assert (full, window) == (PAGES * PAGE, WINDOW_PAGES * PAGE), "slots are lost"
        self.tree.release_host_resources()


class WrittenPrefixes:
    """WrittenKv: the row of each token names all tokens up to it, in every plane."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._pool = served.pool
        self._weights = np.random.default_rng(_SEED).integers(1, 1 << 62, LONGEST + PAGE)
        self._tokens: dict[int, np.ndarray] = {}

    def write(self, req: Req, start: int, tokens: "array[int]") -> None:
        """See WrittenKv."""
        known = np.asarray(req.origin_input_ids)
        if start >= len(known):
            known = np.concatenate([known, tokens])
        self._each(req, known[: start + len(tokens)], start, start, self._put)

    def compare(self, req: Req) -> None:
        """See WrittenKv."""
        found = req.prefix_len
        first = max(0, found - WINDOW_TOKENS)
        self._each(req, np.asarray(req.origin_input_ids)[:found], 0, first, self._compare)

    def _each(self, req: Req, tokens: np.ndarray, start: int, window: int, use: Any) -> None:
        """What is written or read for tokens, the first at ``start``, and the first whose window
        counts at ``window``; layer by layer."""
        if not len(tokens):
            return
        products = (tokens + 1) * self._weights[: len(tokens)]
        tags = torch.from_numpy(np.cumsum(products, dtype=np.int64))
        row = self._served.rows.req_to_token[req.kv.req_pool_idx][: len(tokens)].long()
        swa = self._served.allocator.full_to_swa_index_mapping[row[window:]]
        assert (swa > 0).all(), "the window is not there"
        pool, told = self._pool, f"request {req.rid}, {len(tokens)} tokens"
        # a page has a state for each place of its ring: of its last tokens
        ring = torch.arange(window, len(tokens))
        ring = ring[(ring % PAGE >= PAGE - RING) | (ring >= len(tokens) - RING)]
        of_ring = self._served.allocator.full_to_swa_index_mapping[row[ring]]
        for layer, ratio in enumerate(RATIOS):
            where = f"{told}, layer {layer}: "
            use(pool.get_swa_key_buffer_radix(layer), swa, PAGE, tags[window:], where + "window")
            if ratio:
                last = torch.arange(start, len(tokens))
                last = last[(last + 1) % ratio == 0]
                slots, of = row[last] // ratio, tags[last]
                kv = pool.get_extra_key_buffer(layer)
                use(kv, slots, PAGE // ratio, of, f"{where}C{ratio}")
            if ratio == 4:
                index = pool.get_index_k_with_scale_buffer(layer)
                use(index, slots, PAGE // 4, of, where + "index")
                for name in ("attention", "indexer"):
                    states = getattr(pool, f"get_{name}_compress_states")(layer)
                    places = states.translate_from_swa_loc_to_state_loc(of_ring.clone())
                    buffer = states.kv_score_buffer.kv_score
                    use(buffer, places, 1, tags[ring], f"{where}{name} state")

    def _put(
        self, buffer: torch.Tensor, slots: torch.Tensor, per_row: int, tags: torch.Tensor, _: str
    ) -> None:
        for place in self._places(buffer, per_row):
            place[slots // per_row, slots % per_row] = tags

    def _compare(
        self, buffer: torch.Tensor, slots: torch.Tensor, per_row: int, tags: torch.Tensor, told: str
    ) -> None:
        for place in self._places(buffer, per_row):
            assert torch.equal(place[slots // per_row, slots % per_row], tags), told

    @staticmethod
    def _places(buffer: torch.Tensor, per_row: int) -> list[torch.Tensor]:
        """First and last words of each slot, (rows, slots of a row)."""
        words = buffer.view(len(buffer), -1).view(torch.uint8).view(torch.int64)
        width = words.shape[1] // per_row
        slots = words[:, : width * per_row].view(len(words), per_row, width)
        return [slots[:, :, 0], slots[:, :, -1]]


def conversations() -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, answer): all talk in turns, and some begin as another one does."""
    rng = np.random.default_rng(_SEED)
    system = rng.integers(1, 1 << 20, 3 * PAGE + 40)
    talks = [[system if talk % 2 else rng.integers(1, 1 << 20, 2 * PAGE)] for talk in range(TALKS)]
    found = []
    for _ in range(TURNS):
        for talk in talks:
            talk.append(rng.integers(1, 1 << 20, int(rng.integers(20, 2 * PAGE))))
            prompt, answer = np.concatenate(talk), rng.integers(1, 1 << 20, 30)
            if len(prompt) + len(answer) < LONGEST:
                found.append((prompt, answer))
                talk.append(answer)
    return found


def serve(storage: Path, requests: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """A server from its start to its end."""
    served: Any = Served(storage)
    scheduler = Scheduler(served, WrittenPrefixes(served))
    for number, (prompt, answer) in enumerate(requests):
        served.wait_for_storage(str(number), prompt)
        rejected = scheduler.counted.rejected
        scheduler.serve(prompt, answer)
        if scheduler.counted.rejected > rejected:
            # pages are held while they are copied; an engine tries again in its next step
            served.settle()
            scheduler.serve(prompt, answer)
            assert scheduler.counted.rejected == rejected + 1, "a request is never admitted"
    counters = served.tree.index.counters
    served.close()
    counted = scheduler.counted
    return {
        "from_device": counted.from_device,
        "from_host": counted.from_host,
        "verified": counted.verified,
        "prompt": sum(len(prompt) for prompt, _ in requests),
        "persisted_pages": counters.persisted_pages,
        "persisted_window_pages": counters.persisted_window_pages,
        "counters": {
            name: value
            for name, value in dataclasses.asdict(counters).items()
            if isinstance(value, int)
        },
    }


def states_are_not_copied() -> None:
    of_components = ByteHost.of_components.fget
    assert of_components is not None
    original = of_components

    def without(self: ByteHost) -> Any:
        full, window = original(self)
        return full, window[:1]

    ByteHost.of_components = property(without)  # type: ignore[method-assign, assignment]


def main() -> None:
    """Two servers."""
    folder, *bugs = Path(sys.argv[1]), *sys.argv[2:]
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40  # whatever else is running here
    for bug in bugs:
        globals()[bug]()
    write_model(folder / "model")
    requests = conversations()
    try:
        print(json.dumps(serve(folder / "pages", requests)))
        print(json.dumps(serve(folder / "pages", requests[-TALKS:])))
    except AssertionError as error:
        print(json.dumps(str(error)))


if __name__ == "__main__":
    main()
