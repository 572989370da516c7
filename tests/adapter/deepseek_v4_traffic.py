"""A child process of tests of byte planes: conversations over the engine's pools.

The pools, the allocator, what reads them and the calls of the scheduler are the engine's; the cache
is what our factory builds, with its threads that copy and its storage in files. In place of the
model stands what a forward pass leaves behind: every token's row in every plane names the whole
prefix, and a request compares what it reads, layer by layer, through the engine's getters.

Prints one line of JSON for each of two servers, one after the other, on the same storage; then what
was said when a row was of another prefix.

    python -m tests.adapter.deepseek_v4_traffic DIRECTORY [BUG] [--model NAME] [--requests N]
"""

import argparse
import dataclasses
import itertools
import json
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from launch.bench.call_times import CallTimes
from launch.bench.trace_requests import Scheduler
from sglang_ext.adapter import drafts, factory
from sglang_ext.adapter.byte_pages import ByteHost
from sglang_ext.storage.port import WINDOW
from tests.adapter.byte_models import MODELS, Model, Places, planes_of_drafts
from tests.adapter.deepseek_v4 import PAGE, WINDOW_TOKENS, set_options
from tests.adapter.lost_planes import lose
from tests.adapter.test_identity import write_model

PAGES, WINDOW_PAGES, LONGEST = 24, 12, 20 * PAGE
TALKS, TURNS, CHUNK = 8, 7, 4 * PAGE
_SEED = 20
_MOST_SECONDS = 120.0
"""Whatever is waited for longer than that never comes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rank:
    """A rank of a server.

    Attributes:
        number, count: among those that share a prompt.
        group: of these, None where there is one alone.
        dp_number, dp_count: among those with requests of their own.
    """

    number: int = 0
    count: int = 1
    group: Any = None
    dp_number: int = 0
    dp_count: int = 1

    def tell_engine(self) -> None:
        """As the engine does at start."""
        get_parallel().override_permanently(
            pp_rank=0,
            pp_size=1,
            tp_rank=self.dp_number * self.count + self.number,
            tp_size=self.dp_count * self.count,
            attn_tp_rank=self.number,
            attn_tp_size=self.count,
            attn_dp_rank=self.dp_number,
            attn_dp_size=self.dp_count,
            moe_tp_size=self.dp_count * self.count,
            num_dp_ranks=self.dp_count,
        )


class Served:
    """The cache of a scheduler: what ``launch.bench.trace_requests`` needs of one.

    Args:
        storage: folder of pages; that of the model is beside it.
        model: whose pools.
        rank: whose cache it is.
        options: of the server, beside those that are here.
    """

    has_host = True

    def __init__(
        self,
        storage: Path,
        model: Model,
        rank: Rank | None = None,
        **options: Any,
    ) -> None:
        self.sizes = SimpleNamespace(page=PAGE, chunk=CHUNK)
        self.times = CallTimes()
        self.rank = rank = rank or Rank()
        set_options(
            **{
                "hicache_size": 0.03,
                "chunked_prefill_size": CHUNK,
                "hicache_storage_backend": "file",
                "hicache_storage_backend_extra_config": json.dumps(
                    {"file_storage_path": str(storage)}
                ),
                "hicache_storage_prefetch_policy": "wait_complete",
                **options,
            }
        )
        algorithm = SpeculativeAlgorithm.from_string(model.algorithm)
        get_context().override(
            "test",
            model_path=str(storage.parent / "model"),
            speculative_algorithm=model.algorithm,
        )
        rank.tell_engine()
        self.pool = model.pools(PAGES * PAGE, WINDOW_PAGES * PAGE)
        self.drafts = model.drafts(WINDOW_PAGES * PAGE)
        self.allocator: Any = (
            SWATokenToKVPoolAllocator(
                PAGES * PAGE, WINDOW_PAGES * PAGE, PAGE, torch.uint8, "cpu", self.pool,
                need_sort=False,
            )
            if model.has_windows
            else PagedTokenToKVPoolAllocator(
                PAGES * PAGE, PAGE, torch.uint8, "cpu", self.pool, need_sort=False
            )
        )  # fmt: skip
        self.has_windows = model.has_windows
        self.rows = ReqToTokenPool(2, LONGEST + PAGE, "cpu", enable_memory_saver=False)
        runner = SimpleNamespace(
            prefill_aware_swa=False,
            forward_stream=None,
            lora_manager=None,
            spec_algorithm=algorithm,
        )
        context: Any = SimpleNamespace(
            disable_radix_cache=False,
            params=CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                chunked_prefill_size=CHUNK,
                sliding_window_size=WINDOW_TOKENS if model.has_windows else None,
                tp_cache_group=rank.group,
                is_eagle=algorithm.is_eagle(),
                mtp_draft_device_pools=self.drafts,
            ),
            full_tokens_per_layer=PAGES * PAGE if model.has_windows else None,
            is_hybrid_swa=model.has_windows,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=True,
            tp_worker=SimpleNamespace(
                model_runner=runner, register_hicache_layer_transfer_counter=lambda _: None
            ),
            tp_size=rank.count,
            tp_rank=rank.number,
        )
        self.tree: Any = factory.build_tree_cache(context)
        self._events = self.tree.check_hicache_events
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
        self.step_until(lambda: tree.check_prefetch_progress(name))

    def settle(self) -> None:
        """Until nothing is in flight or on its way to storage."""
        tree = self.tree
        self.step_until(lambda: not (tree.in_flight or tree.ongoing_backup))

    def write_all(self) -> None:
        """Until storage has been asked to take all that waits for it, whatever pauses it made."""
        tree = self.tree
        persists = tree.index.persists
        self.step_until(lambda: not (tree.in_flight or tree.ongoing_backup or persists.n_waiting))

    def be_calm(self) -> None:
        """From now on all that a step finds in flight ends in it. A chunk that is computed while
        pages of the one before are still being copied takes the device from them."""

        def step() -> None:
            self._events()
            self.settle()

        self.tree.check_hicache_events = step

    def step_until(self, done: Callable[[], bool]) -> None:
        """Steps of a scheduler until it is so.

        Raises:
            AssertionError: it never is.
        """
        end = time.monotonic() + _MOST_SECONDS
        while not done():
            assert time.monotonic() < end, "it hangs"
            self._events()

    def close(self) -> None:
        """A server ends."""
        self.settle()
        self.tree.sanity_check()
        if not self.has_windows:
            left = self.allocator.available_size() + self.tree.evictable_size()
            assert left == PAGES * PAGE, "slots are lost"
            self.tree.release_host_resources()
            return
        full = self.allocator.full_available_size() + self.tree.full_evictable_size()
        window = self.allocator.swa_available_size() + self.tree.swa_evictable_size()
        assert (full, window) == (PAGES * PAGE, WINDOW_PAGES * PAGE), "slots are lost"
        self.tree.release_host_resources()


class WrittenPrefixes:
    """WrittenKv: the row of each token names all tokens up to it, in every plane.

    Ranks that share a prompt have other rows of it.
    """

    def __init__(self, served: Served, model: Model) -> None:
        self._served = served
        self._model = model
        seed = _SEED + served.rank.number
        self._weights = np.random.default_rng(seed).integers(1, 1 << 62, LONGEST + PAGE)

    def write(self, req: Req, start: int, tokens: "array[int]") -> None:
        """See WrittenKv."""
        known = np.asarray(req.origin_input_ids)
        if start >= len(known):
            known = np.concatenate([known, tokens])
            # drafts have waited for the first token of the answer
            start -= self._model.overlap
        self._each(req, known, start + len(tokens), (start, start), self._put)

    def compare(self, req: Req) -> None:
        """See WrittenKv."""
        found = req.prefix_len
        first = max(0, found - WINDOW_TOKENS)
        self._each(req, np.asarray(req.origin_input_ids), found, (0, first), self._compare)

    def _each(
        self, req: Req, known: np.ndarray, count: int, first: tuple[int, int], use: Any
    ) -> None:
        """What is written or read for the first ``count`` of known tokens, from ``first`` on of
        each component; see ``Places``."""
        if not count:
            return
        known = known[: count + 1]
        products = (known + 1) * self._weights[: len(known)]
        tags = torch.from_numpy(np.cumsum(products, dtype=np.int64))
        served = self._served
        row = served.rows.req_to_token[req.kv.req_pool_idx][:count].long()
        peers = torch.zeros((PAGES + 1) * PAGE, dtype=torch.int64)
        if served.has_windows:
            peers = served.allocator.full_to_swa_index_mapping
            assert (peers[row[first[1] :]] > 0).all(), "the window is not there"
        at = Places(row, peers, tags, *first)
        planes = [self._model.planes(served.pool, at)]
        if served.has_windows:
            planes += [planes_of_drafts(pool, at, self._model.overlap) for pool in served.drafts]
        for name, buffer, slots, per_row, of in itertools.chain(*planes):
            use(buffer, slots, per_row, of, f"request {req.rid}, {count} tokens, {name}")

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


Requests = list[tuple[np.ndarray, np.ndarray]]
"""(prompt, answer) of each."""


def conversations(least: int, seed: int = _SEED) -> Requests:
    """At least so many requests. All talk in turns, and some begin as another one does, up to a
    place inside a page or to its end; when they have ended, others do."""
    rng = np.random.default_rng(seed)
    system = rng.integers(1, 1 << 20, 3 * PAGE + 40)
    found: Requests = []
    while len(found) < least:
        found += _turns(rng, system)
    return found


def _turns(rng: np.random.Generator, system: np.ndarray) -> Requests:
    begin = {1: system, 2: system[: 2 * PAGE], 3: system}
    talks = [[begin.get(talk % 4, rng.integers(1, 1 << 20, 2 * PAGE))] for talk in range(TALKS)]
    found = []
    for _ in range(TURNS):
        for talk in talks:
            talk.append(rng.integers(1, 1 << 20, int(rng.integers(20, 2 * PAGE))))
            prompt, answer = np.concatenate(talk), rng.integers(1, 1 << 20, 30)
            if len(prompt) + len(answer) < LONGEST:
                found.append((prompt, answer))
                talk.append(answer)
    return found


class Server:
    """A server that serves one request at a time.

    Args:
        served: its cache.
    """

    def __init__(self, served: Any, model: Model) -> None:
        self._served = served
        self._scheduler = Scheduler(served, WrittenPrefixes(served, model))
        self._arrived = 0
        self._prompts = 0

    def serve(self, requests: Requests) -> None:
        """One after the other."""
        for prompt, answer in requests:
            self._serve(prompt, answer)

    def _serve(self, prompt: np.ndarray, answer: np.ndarray) -> None:
        self._served.wait_for_storage(str(self._arrived), prompt)
        self._arrived += 1
        self._prompts += len(prompt)
        # pages are held while they are copied, and any step may begin to copy some: an engine
        # tries again in its next one
        self._served.step_until(lambda: self._is_admitted(prompt, answer))

    def _is_admitted(self, prompt: np.ndarray, answer: np.ndarray) -> bool:
        """Whether a request was admitted, and so has ended; if not, what held pages has."""
        counted = self._scheduler.counted
        rejected = counted.rejected
        self._scheduler.serve(prompt, answer)
        if counted.rejected == rejected:
            return True
        self._served.settle()
        return False

    def found(self, prompt: np.ndarray, answer: np.ndarray) -> int:
        """Tokens that a request does not compute."""
        counted = self._scheduler.counted
        before = counted.from_device + counted.from_host
        self.serve([(prompt, answer)])
        return counted.from_device + counted.from_host - before

    def counted(self) -> dict[str, Any]:
        """What has happened, JSON."""
        counted = self._scheduler.counted
        return {
            "from_device": counted.from_device,
            "from_host": counted.from_host,
            "verified": counted.verified,
            "prompt": self._prompts,
            "window_cost": self._served.tree.index.policy.window_cost,
            "counters": self._served.tree.index.counters.as_dict(),
        }


def serve(storage: Path, model: Model, requests: Requests, **options: Any) -> dict[str, Any]:
    """A server from its start to its end. Slow copies and a slow disk take nothing from the last
    talks, so what a restart finds of them does not depend on it."""
    served: Any = Served(storage, model, **options)
    server = Server(served, model)
    server.serve(requests[:-TALKS])
    served.be_calm()
    for request in requests[-TALKS:]:
        server.serve([request])
        served.settle()
    served.close()
    return server.counted()


def branches(storage: Path, model: Model, requests: Requests) -> list[int]:
    """What a server finds of prompts that leave the longest one at each of its pages, the deepest
    first."""
    served: Any = Served(storage, model)
    server = Server(served, model)
    longest, answer = max(requests, key=lambda request: len(request[0]))
    found = [
        server.found(np.concatenate([longest[:stop], answer]), answer)
        for stop in range(len(longest) // PAGE * PAGE, 0, -PAGE)
    ]
    served.close()
    return found


def states_are_not_copied() -> None:
    of_components = ByteHost.of_components.fget
    assert of_components is not None
    original = of_components

    def without(self: ByteHost) -> Any:
        full, window = original(self)
        return full, window[:1]

    ByteHost.of_components = property(without)  # type: ignore[method-assign, assignment]


def _load(which: Callable[[Any], Any]) -> None:
    schedule = ByteHost.schedule.fget
    assert schedule is not None
    original = schedule
    ByteHost.schedule = property(  # type: ignore[method-assign, assignment]
        lambda self: which(original(self))
    )


def the_last_layer_is_not_loaded() -> None:
    _load(lambda gates: [*gates[:-1], []])


def pages_are_named_by_their_own_tokens_alone() -> None:
    drafts.overlap = lambda _: 0


def windows_are_not_loaded() -> None:
    _load(lambda gates: [[layer for layer in gate if layer[0] != WINDOW] for gate in gates])


def main() -> None:
    """Two servers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("bugs", nargs="*")
    parser.add_argument("--model", choices=MODELS, default="deepseek-v4")
    parser.add_argument("--requests", type=int, default=1, help="at least")
    parser.add_argument("--branches", action="store_true", help="a line more, see branches")
    parser.add_argument("--lose", nargs=3, metavar=("POOL", "PLANE", "WAY"), help="see lost_planes")
    args = parser.parse_args()
    base.host_memory_budget_bytes = lambda *_, **__: 1 << 40  # whatever else is running here
    for bug in args.bugs:
        globals()[bug]()
    if args.lose:
        pool, plane, way = args.lose
        lose(int(pool), int(plane), way)
    write_model(args.folder / "model")
    model, requests = MODELS[args.model], conversations(args.requests)
    try:
        print(json.dumps(serve(args.folder / "pages", model, requests)))
        # with room for all that it reads: what it finds is what was stored
        restarted = serve(args.folder / "pages", model, requests[-TALKS:], hicache_size=0.06)
        print(json.dumps(restarted))
        if args.branches:
            print(json.dumps(branches(args.folder / "pages", model, requests)))
    except AssertionError as error:
        print(json.dumps(str(error)))


if __name__ == "__main__":
    main()
