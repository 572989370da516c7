"""SGLang's view of the cache: translate, call the index, translate back."""

import logging
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)

from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.batch_order import heaviest_first
from sglang_ext.adapter.cache_control import CacheControl
from sglang_ext.adapter.controller import HostTierController
from sglang_ext.adapter.device_kv import DeviceKv
from sglang_ext.adapter.handles import Prefix, importance, request_number
from sglang_ext.adapter.handover import Handovers
from sglang_ext.adapter.idle_check import IdleCheck
from sglang_ext.adapter.inside import InsidePages
from sglang_ext.adapter.keys import Keys
from sglang_ext.adapter.locks import Locks
from sglang_ext.adapter.prompt_tokens import Found
from sglang_ext.adapter.session_refs import SessionRefs
from sglang_ext.adapter.storage_front import StorageFront
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.host.arena import ArenaPool
from sglang_ext.core.plan import PrefixMatch, TransferKind
from sglang_ext.core.table.columns import Rows

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from sglang_ext.adapter.device_pool import EngineDevicePool
    from sglang_ext.adapter.full_alone import FullAloneDevicePool
    from sglang_ext.adapter.host_arena import ArenaMemory, HostUsage
    from sglang_ext.adapter.host_kv import HostKv
    from sglang_ext.adapter.idle_calls import WaitingRelease
    from sglang_ext.adapter.kv_events import KvEvents
    from sglang_ext.adapter.metrics import IndexMetrics
    from sglang_ext.adapter.request_spans import RequestSpans
    from sglang_ext.adapter.step_trace import StepTrace
    from sglang_ext.adapter.window_only import WindowOnlyDevicePool

logger = logging.getLogger(__name__)


class SwaHiCache(BasePrefixCache):
    """Tiered prefix cache for hybrid sliding-window models.

    Attributes that the engine reads:
        sliding_window_size: tokens behind a sequence whose sliding-window KV the
            engine must keep, and count in its budgets.
        draft_swa_window: those that drafts read.
        cache_controller: None without a host tier.
        ongoing_write_through, ongoing_load_back: transfers in flight.
        ongoing_prefetch, ongoing_backup: lookups and reads of storage, writes: while there are
            any, it does not flush and does not detach.
        hicache_storage_pass_prefix_keys: False; backends get no keys of what is in front.
        kv_events: None if this process publishes no KV events.

        enable_session_radix_cache: whether it may tell the cache of sessions.

    Attributes of ours:
        storage: the storage tier.
        resets: how often everything was dropped.
        waiting_release: see ``idle_calls``.
        control: calls of an operator.
        keys: what the engine's keys are in the table.

    Args:
        kv: what the engine is told of the device; by default that there are both components.
        inside: where device pages are smaller than the table's.
        low_values_first: see ``importance``.
        session_refs: None if the server does not tell the cache of sessions.
    """

    hicache_storage_pass_prefix_keys = False

    def __init__(
        self,
        params: "CacheInitParams",
        index: PrefixCache,
        device_pool: "EngineDevicePool | WindowOnlyDevicePool | FullAloneDevicePool",
        admission: Admission,
        *,
        kv: DeviceKv | None = None,
        inside: InsidePages | None = None,
        low_values_first: bool = False,
        session_refs: SessionRefs | None = None,
    ) -> None:
        self.disable = False
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.sliding_window_size = index.geometry.retained_tokens
        self.draft_swa_window = params.draft_swa_window
        self.index = index
        self._device_pool = device_pool
        self._page_tokens = index.geometry.page_tokens
        self._admission = admission
        self._low_values_first = low_values_first
        self._session_refs = session_refs
        self.enable_session_radix_cache = session_refs is not None
        self._inside = inside
        window = index.geometry.window_pages * self._page_tokens
        self._surely_admitted = admission.surely_up_to(window)
        self._kv = kv or DeviceKv(index)
        self._locks = Locks(index)
        self.keys = Keys(index, inside)
        self._handovers = Handovers(
            index, device_pool, params.req_to_token_pool, self.keys, self._locks, inside
        )
        root = self.keys.root
        self._nothing = MatchResult(0, root, root, root)
        self._idle_check = IdleCheck(index)
        self.resets = 0
        self.storage = StorageFront(index, lambda: self.holds_nothing)
        # the host tier, see attach_host_tier
        self.cache_controller: HostTierController | None = None  # type: ignore[assignment]
        self.full_kv_pool_host: Any = None
        self._host: HostKv | None = None
        self._host_memory: ArenaMemory | None = None
        self.metrics: IndexMetrics | None = None
        self.spans: RequestSpans | None = None
        self.step_trace: StepTrace | None = None
        self.waiting_release: WaitingRelease | None = None
        self.kv_events: KvEvents | None = None  # type: ignore[assignment]
        self.control = CacheControl(self)

    def attach_host_tier(
        self,
        controller: HostTierController,
        host: "HostKv",
        usage: "HostUsage",
    ) -> None:
        """Give the cache its host tier; at start, before any request."""
        self.cache_controller = controller
        self._host = host
        self._host_memory = host.memory
        self.full_kv_pool_host = usage

    # ---- capabilities --------------------------------------------------------

    def supports_swa(self) -> bool:
        """Whether sliding-window slots are freed separately."""
        return self._kv.has_windows

    def supports_prefix_sharing(self) -> bool:
        """Prefixes outlive their requests."""
        return True

    # ---- match ---------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Best resume point for a prompt: what is on the device, and what a load adds."""
        key = params.key
        match = found = self.index.match_and_use(*self.keys.of(key))
        if match.cut and match.device_pages < len(match.rows):
            match = self._loadable(match, params)
        # the key itself may be limited, the prefill is not
        if len(match.rows) and len(key.token_ids) > self._surely_admitted:
            match = self._admissible(match, params)
        if self.metrics is not None:
            self._tell_found(self.metrics, params.req, found, match)
        if self.spans is not None and params.req is not None:
            self.spans.matched(params.req)
        if len(match.rows) == 0:
            return self._nothing
        rows, pages, to_pin, _, cut = match
        page = self._page_tokens
        best = on_device = self.keys.prefix(rows, cut)
        length = on_device_length = len(rows) * page - cut
        if pages < len(rows):
            on_device = self.keys.prefix(rows[:pages])
            on_device_length = pages * page
        return MatchResult(
            device_prefix_len=on_device_length,
            last_device_node=on_device,
            last_host_node=best,
            best_match_node=best,
            host_hit_length=length - on_device_length,
            swa_host_hit_length=to_pin * page if self._kv.has_windows else 0,
        )

    def _tell_found(
        self, metrics: "IndexMetrics", req: "Req | None", found: PrefixMatch, offered: PrefixMatch
    ) -> None:
        page = self._page_tokens
        resume, possible = (len(match.rows) * page - match.cut for match in (offered, found))
        # a page that the request would resume inside is not counted with those behind it
        known = (len(found.rows) - (found.cut > 0) + found.behind) * page
        metrics.matched(req, offered.rows, Found(resume, possible, known))

    def _loadable(self, match: PrefixMatch, params: MatchPrefixParams) -> PrefixMatch:
        """The match, or the best one of whole pages if a load must not end inside one."""
        assert self._inside is not None
        if self._inside.may_load(len(match.rows), self._max_new_tokens(params.req)):
            return match
        pages, namespace, _ = self.keys.of(params.key)
        return self.index.match(pages, namespace)

    def _admissible(self, match: PrefixMatch, params: MatchPrefixParams) -> PrefixMatch:
        """The match, or the best part of it with which the engine can admit the request."""
        page = self._page_tokens
        locked = len(self.index.window_of(match.rows[: match.device_pages])) * page
        length, max_new = len(params.key.token_ids), self._max_new_tokens(params.req)
        part = self._admission.possible_part(match, locked, length, max_new, page)
        self.index.counters.inadmissible += part is not match
        return part

    def _max_new_tokens(self, req: "Req | None") -> int:
        """Tokens a request may still generate; where it is unknown, more than matter."""
        if req is None or req.sampling_params.max_new_tokens is None:
            return self.sliding_window_size
        return max(0, req.sampling_params.max_new_tokens - len(req.output_ids))

    def touch_prefix(self, key: "RadixKey") -> None:
        """Refresh the recency of a waiting request's prefix."""
        self.index.match_and_use(*self.keys.of(key))

    def root_node_handle(self, extra_key: str | None = None) -> Prefix:
        """Handle of the empty prefix."""
        return self.keys.root

    def dfs_weight_order(self, node_handles: Sequence[Prefix]) -> list[int]:
        """Requests in depth-first order, the prefix shared by most first."""
        return heaviest_first([handle.rows for handle in node_handles])

    def path_device_indices(self, node: Prefix) -> torch.Tensor:
        """Token indices of a prefix as the engine writes them, int64 on the device."""
        table, rows = self.index.table, node.rows
        full, swa = table.device.slots[rows], table.swa_device.slots[rows]
        tokens = self._device_pool.row_tokens(full, swa)
        return tokens[: len(tokens) - node.cut] if node.cut else tokens

    # ---- lock ----------------------------------------------------------------

    def inc_lock_ref(self, node: Prefix) -> IncLockRefResult:
        """Lock a prefix. The receipt's ``node_id`` names the lock."""
        assert len(node.rows) == 0 or self.keys.is_current(node), "lock on an evicted prefix"
        return IncLockRefResult(node_id=self._locks.take(node.rows))

    def dec_lock_ref(
        self, node: Prefix, params: DecLockRefParams | None = None
    ) -> DecLockRefResult:
        """Release the lock that the receipt names."""
        assert params is not None, "release without a receipt"
        assert params.node_id is not None, "release without a receipt"
        self._locks.release(params.node_id)
        return DecLockRefResult()

    # ---- insert --------------------------------------------------------------

    def checkpoint(self, req: "Req", *, up_to: int, **kwargs: Any) -> None:
        """Take over the whole pages of a request's row up to ``up_to`` and lock them; when it
        has finished, what is behind them too."""
        number = request_number(req.rid)
        priority = importance(
            getattr(req, "priority", None), low_values_first=self._low_values_first
        )
        owned = self._handovers.owned(req, up_to)
        if owned.is_nothing:
            rows = req.last_node.rows
            if self.index.count_request(rows, number, priority):
                self._queue_backup(rows)
            self._note_end(req, rows)
            return
        taken = self._handovers.take(req, owned, number, priority)
        if taken is None:
            self._note_end(req, req.last_node.rows)
            return
        rows, tokens = taken
        node = self.keys.prefix(rows, len(rows) * self._page_tokens - tokens)
        old_lock, req.lock = req.lock, self.lock(node)
        self.unlock(old_lock)
        req.last_node = node
        req.kv.cache_protected_len = tokens
        req.kv.cache_inserted_len = max(req.kv.cache_inserted_len, tokens)
        self._queue_backup(rows)
        self._note_end(req, rows)

    def _note_end(self, req: "Req", rows: Rows) -> None:
        """A request of which the cache has a path has ended, if it has."""
        if req.finished():
            if self.metrics is not None:
                self.metrics.ended(req, rows)
            geometry = self.index.geometry
            self.index.end_request(rows, geometry.whole_pages_in(len(req.origin_input_ids)))
            if self._session_refs is not None:
                self._session_refs.ended(req, rows)
        elif self.metrics is not None:
            self.metrics.used(rows)

    def _queue_backup(self, rows: Rows) -> None:
        if self.cache_controller is not None:
            self.cache_controller.queue_backup(rows)

    # ---- sessions --------------------------------------------------------------

    def open_radix_session(self, session_id: str) -> int:
        """See ``SessionRefs.open``."""
        assert self._session_refs is not None
        return self._session_refs.open(session_id)

    def ensure_session_generation(self, session_id: str) -> int:
        """See ``SessionRefs.generation``."""
        assert self._session_refs is not None
        return self._session_refs.generation(session_id)

    def release_radix_session(self, session_id: str) -> None:
        """See ``SessionRefs.close``; the engine says so of every session that it closes."""
        if self._session_refs is not None:
            self._session_refs.close(session_id)

    # ---- evict ---------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """Free device slots; the numbers are shortfalls in tokens."""
        start = time.perf_counter()
        freed = self._kv.evict(params)
        self.update_eviction_metrics(self._kv.counted(freed), start)
        return freed

    def full_evictable_size(self) -> int:
        """Tokens of full-attention KV that ``evict`` can free."""
        return self._kv.full_evictable()

    def full_protected_size(self) -> int:
        """Tokens of full-attention KV that are locked."""
        return self._kv.full_protected()

    def swa_evictable_size(self) -> int:
        """Tokens of sliding-window KV that ``evict`` can free."""
        return self._kv.swa_evictable()

    def swa_protected_size(self) -> int:
        """Tokens of sliding-window KV that are locked."""
        return self._kv.swa_protected()

    def evictable_size(self) -> int:
        """Tokens that ``evict`` can free of the component that has all of a prefix."""
        return self._kv.evictable()

    def protected_size(self) -> int:
        """Tokens that are locked of that component."""
        return self._kv.protected()

    # ---- host tier -----------------------------------------------------------

    @property
    def ongoing_write_through(self) -> dict[int, Any]:
        """Backups in flight."""
        return self.index.pending[TransferKind.BACKUP]

    @property
    def ongoing_load_back(self) -> dict[int, Any]:
        """Loads in flight."""
        return self.index.pending[TransferKind.LOAD]

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Prefix]:
        """Begin to load the matched prefix; (0, device prefix) means recompute."""
        assert params.req is not None
        node: Prefix = params.best_match_node
        controller = self.cache_controller
        if controller is None or not self.keys.is_current(node):
            return 0, params.req.last_node
        missing = 0
        if self.metrics is not None:  # before the load: it has slots for them at once
            window = self.index.window_of(node.rows)
            missing = int(np.count_nonzero(~self.index.table.swa_device.present[window]))
        if not controller.queue_load(node.rows):
            return 0, params.req.last_node
        tokens = len(node.rows) * self._page_tokens - node.cut - params.req.prefix_len
        if self.metrics is not None:
            self.metrics.prompts.loads(params.req.rid, missing)
        if self.spans is not None:
            self.spans.load_begun(params.req, tokens)
        return tokens, node

    def ready_to_load_host_cache(self) -> int:
        """Submit the queued loads; the number the batch waits for, or -1."""
        return -1 if self.cache_controller is None else self.cache_controller.submit_loads()

    def check_hicache_events(self) -> None:
        """Commit what has ended; once in every scheduler step, on every rank."""
        if self.cache_controller is not None:
            start = time.perf_counter()
            self.cache_controller.commit_finished()
            self.cache_controller.queue_demotions()
            self.cache_controller.submit_backups()
            if self.step_trace is not None:
                in_flight = len(self.ongoing_write_through)
                self.step_trace.step(start, in_flight, idle=not self._locks)
            if self.spans is not None:
                self.spans.look()
            if self.metrics is not None:
                self.metrics.publish(at_once=not self._locks)

    def flush_pending_backups(self) -> None:
        """Submit the backups queued by the last batch."""
        if self.cache_controller is not None:
            self.cache_controller.submit_backups()
        elif self.metrics is not None:
            # without a host tier nobody comes by when there is nothing to do
            self.metrics.publish(at_once=not self._locks)

    # ---- storage tier --------------------------------------------------------

    @property
    def enable_storage(self) -> bool:
        """Whether a storage backend is attached."""
        return self.storage.tier is not None

    @property
    def ongoing_prefetch(self) -> dict[int, Any]:
        """Lookups and reads in flight."""
        return self.storage.reading

    @property
    def ongoing_backup(self) -> Sequence[int]:
        """Writes in flight, and those that are promised."""
        return self.storage.writing

    def prefetch_from_storage(
        self,
        handle: Hashable,
        last_host_node: Prefix,
        new_input_tokens: Sequence[int],
        last_hash: Any = None,
        prefix_keys: Any = None,
        **rest: Any,
    ) -> None:
        """A request waits: look for its prompt in storage, and read what is there.

        Args:
            rest: ``matched_prefix_tokens``, those before ``new_input_tokens``; ``extra_key``
                and ``cache_salt`` of the request; more that only stock's cache needs.
        """
        if self.storage.tier is not None:
            parts = (rest["matched_prefix_tokens"], new_input_tokens)
            tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
            namespace = (rest["extra_key"], rest["cache_salt"])
            if self.spans is not None:
                self.spans.prefetch_begun(handle)
            self.storage.prefetch(handle, self.keys.pages(tokens, len(tokens)), namespace)

    def check_prefetch_progress(self, handle: Hashable) -> bool:
        """Whether a request may be scheduled."""
        return self.storage.is_ready(handle)

    def pop_prefetch_loaded_span(self, handle: Hashable) -> tuple[int, int | None]:
        """See ``StorageFront.pop_loaded``."""
        loaded = self.storage.pop_loaded(handle)
        if self.spans is not None:
            self.spans.prefetch_ended(handle, loaded[0])
        return loaded

    def release_aborted_request(self, handle: Hashable) -> None:
        """A request has gone."""
        self.storage.forget(handle)
        if self.spans is not None:
            self.spans.forget(handle)

    def is_backuped(self, node: Prefix) -> bool:
        """Storage is asked whatever a prefix ends with."""
        return True

    def is_root(self, node: Prefix) -> bool:
        """Whether a prefix is empty."""
        return len(node.rows) == 0

    def get_last_hash_value(self, node: Prefix) -> None:
        """Keys are the index's matter."""

    def get_prefix_hash_values(self, node: Prefix) -> None:
        """Keys are the index's matter."""

    def attach_storage_backend(
        self,
        storage_backend: str,
        storage_backend_extra_config_json: str | None = None,
        served_model_name: str | None = None,
        hicache_storage_prefetch_policy: str | None = None,
        hicache_write_policy: str | None = None,
    ) -> tuple[bool, str]:
        """See ``StorageFront.attach``; (done, message)."""
        from sglang.srt.runtime_context import get_memory

        return self.storage.attach(
            storage_backend,
            storage_backend_extra_config_json,
            served_model_name,
            hicache_storage_prefetch_policy or get_memory().hicache_storage_prefetch_policy,
            hicache_write_policy,
        )

    def detach_storage_backend(self) -> tuple[bool, str]:
        """See ``StorageFront.detach``; (done, message)."""
        return self.storage.detach()

    def clear_storage_backend(self) -> bool:
        """See ``StorageFront.clear``."""
        return self.storage.clear()

    # ---- life cycle ----------------------------------------------------------

    def settle(self, *, give_up: bool) -> None:
        """Let what is in flight end; see ``HostTierController.settle``."""
        if self.cache_controller is not None:
            self.cache_controller.settle(give_up=give_up)

    def reset(self) -> None:
        """Drop everything; the engine clears its allocator right after."""
        if self.cache_controller is not None:
            self.cache_controller.reset()
        if (tier := self.index.host_tier) is not None:
            for pool in (tier.full, tier.window):
                assert isinstance(pool, ArenaPool)
                pool.arena.clear()
        self._device_pool.reset()
        self.index.reset()
        if self.kv_events is not None:
            self.kv_events.cleared()
        if self.metrics is not None:
            self.metrics.flushed()
        self._locks.clear()
        self.resets += 1
        self.storage.follow_weights()

    @property
    def in_flight(self) -> bool:
        """Whether anything is copied, looked for, read or written; the same on every rank."""
        storage = self.index.n_storage_operations > 0
        return bool(self.ongoing_write_through or self.ongoing_load_back or storage)

    @property
    def holds_nothing(self) -> bool:
        """Whether no page is in any tier but storage, no request runs, nothing is in flight."""
        return not (self.index.table.n_rows or self._locks or self.in_flight)

    def release_host_resources(self) -> None:
        """At shutdown: end transfers, unpin host memory."""
        if self.cache_controller is not None:
            if not self.storage.is_nobodys:
                self.cache_controller.save_everything()
            self.cache_controller.close()
            self.storage.remove_nobodys()
        if self._host is not None:
            self._host.close()

    # ---- checks --------------------------------------------------------------

    def sanity_check(self) -> None:
        """All invariants, at idle."""
        if not (self.in_flight or self.ongoing_backup):
            self._idle_check.run(len(self._locks), self._host_memory)

    def available_and_evictable_str(self) -> str:
        """One line for out-of-memory messages."""
        allocator = self.token_to_kv_pool_allocator
        if not self._kv.has_windows:
            return f"{allocator.available_size()} available + {self.evictable_size()} evictable\n"
        return (
            f"full: {allocator.full_available_size()} available + "
            f"{self.full_evictable_size()} evictable, {self.full_protected_size()} protected; "
            f"sliding window: {allocator.swa_available_size()} available + "
            f"{self.swa_evictable_size()} evictable, {self.swa_protected_size()} protected; "
            f"in flight: {len(self.ongoing_write_through)} backups, "
            f"{len(self.ongoing_load_back)} loads\n"
        )

    def pretty_print(self) -> None:
        """Log the state; the engine calls it before it gives up on an allocation."""
        logger.error("%s", self.available_and_evictable_str())

    def total_size(self) -> int:
        """Tokens of full-attention KV on the device."""
        return self.index.table.device.n_present * self._page_tokens
