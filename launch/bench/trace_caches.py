"""The cache of a scheduler in this process, ours or stock's, over pools with rows of a few bytes.

The pools, the allocator and the cache are the engine's or those that its factory builds; a token
has the rows of one layer of each kind, in place of all of a model (``trace_models``). Both caches
have as many tokens as with the model.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from launch.bench.call_times import CallTimes
from launch.bench.trace_copies import FULL, KINDS, WINDOW, Copies, CopiesAtOnce
from launch.bench.trace_models import TraceModel
from sglang_ext.adapter import factory

CALLS = {
    "match": ("match_prefix", "touch_prefix"),
    "lock": ("lock", "unlock"),
    "load": ("init_load_back", "ready_to_load_host_cache"),
    "indices": ("prefix_device_indices", "path_device_indices"),
    "evict": ("evict_for_alloc", "evict"),
    "insert": ("checkpoint",),
    "flush_pending_backups": ("flush_pending_backups",),
    "check_hicache_events": ("check_hicache_events",),
    "windows": ("evict_sliding_windows",),
    "release": ("claim_kv_row", "free_kv_row", "on_release"),
}
"""What the scheduler calls, by what it is for."""
OURS, STOCK = "ours", "stock"
_MOST_STEPS = 10_000
"""Until nothing is in flight; each begins a batch of copies at most."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Memory and pages.

    Attributes:
        model: says how many tokens have sliding-window KV.
        device_tokens: with full-attention KV.
        host_bytes: of the model; 0 for no host tier.
        page: tokens.
        chunk: tokens that are prefilled at a time.
        longest: tokens of the longest request.
    """

    model: TraceModel
    device_tokens: int
    host_bytes: int
    page: int
    chunk: int
    longest: int

    @property
    def on_device(self) -> tuple[int, int]:
        """Tokens with full-attention and with sliding-window KV, whole pages."""
        tokens, window = self.device_tokens, int(self.device_tokens * self.model.window_share)
        return tokens // self.page * self.page, window // self.page * self.page

    def options(self, layout: str) -> dict[str, Any]:
        """Of the engine.

        Args:
            layout: of a host, where the model does not say.
        """
        host: dict[str, Any] = {}
        if self.host_bytes:
            host = {
                "enable_hierarchical_cache": True,
                "hicache_write_policy": "write_through",
                **self.model.host_options(self.host_bytes, *self.on_device),
            }
        return {
            "hicache_mem_layout": layout,
            "model_path": "dummy",
            "page_size": self.page,
            "attention_backend": "torch_native",
            "chunked_prefill_size": self.chunk,
            **host,
        }


class Cache:
    """A cache as its scheduler has it: with the pools, the allocator and the rows of requests.

    Attributes:
        tree: ours or stock's.
        times: of its calls.
        copies: between the tiers.
    """

    def __init__(self, system: str, sizes: Sizes) -> None:
        self.sizes = sizes
        self.times = CallTimes()
        self.copies = Copies(self.times)
        layout = "page_first" if system == OURS else "layer_first"
        arguments = ServerArgs(**sizes.options(layout))
        # what the engine takes from the model's configuration, which is not there
        arguments._mamba_cache_chunk_size = sizes.page
        set_global_server_args_for_scheduler(arguments)
        self.pool, self.allocator, self.rows = _memory(sizes)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=sizes.page,
            chunked_prefill_size=sizes.chunk,
            sliding_window_size=sizes.model.shape.window - 1,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )
        self._built: Ours | Stock
        if system == OURS:
            self._built = Ours(params, self.copies, host=self.has_host)
        else:
            host = arguments if self.has_host else None
            self._built = Stock(params, self.copies, sizes.model, host)
        self.tree = self._built.tree
        self.times.watch(self.tree, CALLS)

    @property
    def has_host(self) -> bool:
        """Whether there is a host tier."""
        return self.sizes.host_bytes > 0

    @property
    def most_again(self) -> int:
        """Most tokens of a prompt that the cache did not give although it had their
        full-attention KV."""
        return self._built.most_again

    def host_pages(self) -> dict[str, list[int]]:
        """[used, all] host pages by kind of KV. Ours has one memory for both kinds: all are what
        there would be of one kind alone."""
        return self._built.host_pages() if self.has_host else {}

    def check_idle(self) -> None:
        """Nothing is lost: with no request, all slots are free or the cache's.

        Raises:
            AssertionError: some are not.
        """
        allocator, tree = self.allocator, self.tree
        if self.has_host:
            # a step may begin copies ahead of evictions
            for _ in range(_MOST_STEPS):
                tree.check_hicache_events()
                if not (tree.ongoing_write_through or tree.ongoing_load_back):
                    break
        tree.sanity_check()
        full = allocator.full_available_size() + tree.full_evictable_size()
        window = allocator.swa_available_size() + tree.swa_evictable_size()
        assert (full, window) == self.sizes.on_device, (full, window)


def _memory(sizes: Sizes) -> tuple[BaseSWAKVPool, SWATokenToKVPoolAllocator, ReqToTokenPool]:
    page, model, device = sizes.page, sizes.model, "cpu"
    tokens, window_tokens = sizes.on_device
    pool = model.pool(tokens, window_tokens, page)
    allocator = SWATokenToKVPoolAllocator(
        tokens, window_tokens, page, model.dtype, device, pool, need_sort=False
    )
    rows = ReqToTokenPool(2, sizes.longest + page, device, enable_memory_saver=False)
    return pool, allocator, rows


class Ours:
    """Our cache, as its factory builds it."""

    def __init__(self, params: CacheInitParams, copies: Copies, *, host: bool) -> None:
        worker = SimpleNamespace(
            model_runner=SimpleNamespace(
                prefill_aware_swa=False,
                forward_stream=None,
                lora_manager=None,
                spec_algorithm=SpeculativeAlgorithm.NONE,
            ),
            register_hicache_layer_transfer_counter=lambda _: None,
        )
        context: Any = SimpleNamespace(
            disable_radix_cache=False,
            params=params,
            full_tokens_per_layer=1,
            is_hybrid_swa=True,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=host,
            tp_worker=worker,
            tp_size=1,
            tp_rank=0,
        )
        engine = functools.partial(CopiesAtOnce, copies, params.page_size)
        with patch.object(factory, "CpuTransferEngine", engine):
            self.tree: Any = factory.build_tree_cache(context)
        self.most_again = 0
        self._match = self.tree.index.match_and_use
        self.tree.index.match_and_use = self._observed

    def _observed(self, *args: Any) -> Any:
        match = self._match(*args)
        again = match.behind * self.tree.index.geometry.page_tokens
        self.most_again = max(self.most_again, again)
        return match

    def host_pages(self) -> dict[str, list[int]]:
        """See Cache."""
        arena = self.tree._host_memory.arena
        return {kind: [arena.taken(n), arena.shape.pages(n)] for n, kind in enumerate(KINDS)}


class Stock:
    """The engine's cache.

    Args:
        model: whose host pools it has.
        arguments: of the engine, for the host tier; None for none.
    """

    def __init__(
        self,
        params: CacheInitParams,
        copies: Copies,
        model: TraceModel,
        arguments: ServerArgs | None,
    ) -> None:
        self.tree: Any = UnifiedRadixCache(params)
        self.most_again = 0
        self._page = params.page_size
        self._match = self.tree.match_prefix
        self.tree.match_prefix = self._observed
        self._host: dict[str, Any] = {}
        if arguments is not None:
            self.tree.init_hicache(arguments, params)
            entries = self.tree.cache_controller.mem_pool_host.entry_map
            kinds = {name: kind for kind, name in model.counted.items()}
            for kind, name in ((FULL, PoolName.KV), (WINDOW, PoolName.SWA)):
                self._host[kind] = entries[name].host_pool
            for name, entry in entries.items():
                _count_copies(entry.host_pool, copies, kinds.get(name), made=model.copied)

    def _observed(self, *args: Any) -> Any:
        match = self._match(*args)
        found = match.device_prefix_len + match.host_hit_length
        self.most_again = max(self.most_again, match.full_kv_hit_length - found)
        return match

    def host_pages(self) -> dict[str, list[int]]:
        """See Cache."""
        page = self._page
        return {
            kind: [(pool.size - pool.available_size()) // page, pool.size // page]
            for kind, pool in self._host.items()
        }


def _count_copies(pool: Any, copies: Copies, kind: str | None, *, made: bool) -> None:
    """Count the copies of a host pool of the engine.

    Args:
        kind: whose tokens they are; None for those of a pool beside another.
        made: whether they are made, too.
    """
    backup = pool.backup_from_device_all_layer_physical
    load = pool.load_to_device_per_layer_physical

    def tokens(host: Any) -> dict[str, int]:
        return {} if kind is None else {kind: len(host)}

    def to_host(device_pool: Any, host: Any, *rest: Any, **more: Any) -> None:
        with copies.made(copies.to_host, tokens(host)):
            if made:
                backup(device_pool, host, *rest, **more)

    def to_device(
        device_pool: Any, host: Any, device: Any, layer: int, *rest: Any, **more: Any
    ) -> None:
        # a transfer has one for each layer
        with copies.made(copies.to_device, tokens(host) if layer == 0 else {}):
            if made:
                load(device_pool, host, device, layer, *rest, **more)

    pool.backup_from_device_all_layer_physical = to_host
    pool.load_to_device_per_layer_physical = to_device
