"""A simulated engine: requests against a PrefixCache, with a content oracle.

It does what SGLang's scheduler does to a tree cache: match, lock, load back,
prefill in chunks, decode, slide the window, retract, abort, finish. Every request
checks, before each step, that every slot it is about to read holds the KV of its
own prefix.
"""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core import invariants
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.constants import FREE, PAD
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.eviction_policy import EVERY
from sglang_ext.core.fingerprint import fingerprint
from sglang_ext.core.host.room import Claim
from sglang_ext.core.host.tier import HostTier, SharedMemory
from sglang_ext.core.inserts import Tail
from sglang_ext.core.moves.ledger import Ledger
from sglang_ext.core.plan import Declined, Transfer, TransferKind
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.plan import Prefetch
from sglang_ext.core.table.columns import ABSENT, Rows, Slots
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import behind_pages, filled_up, pages_of
from sglang_ext.core.table.table import STORED
from sglang_ext.testing.pools import LAYERS, SimDevicePool, SimSlots, Tags, prefix_tags
from sglang_ext.testing.requests import (
    Arrival,
    DeviceFullError,
    SimRequest,
    behind_whole_pages,
    whole_pages,
)
from sglang_ext.testing.shared_memory import SimSharedMemory
from sglang_ext.testing.sizes import Sizes
from sglang_ext.testing.storage import SimStorage, SimStore, StorageFaults
from sglang_ext.testing.transfers import HostSlots, Pace, SimLane

__all__ = ["Arrival", "DeviceFullError", "SimEngine", "SimRequest", "Sizes"]


class SimEngine:
    """One rank: requests, pools and transfers around one index.

    Args:
        seed: decides when copies end and which fail; other ranks have another one.
        index_type: the index to run, for instance a ModelledIndex.
        store: what this rank has in storage, if the sizes say that there is one.
        storage_faults: what goes wrong there.
    """

    def __init__(
        self,
        geometry: Geometry,
        sizes: Sizes,
        pace: Pace | None = None,
        seed: int = 0,
        index_type: type[PrefixCache] = PrefixCache,
        store: SimStore | None = None,
        storage_faults: StorageFaults | None = None,
        loops: Loops = COMPILED,
    ) -> None:
        self.geometry = geometry
        self.device = SimDevicePool(sizes.device_pages, sizes.device_window_pages, geometry)
        per_page = geometry.slots_per_page
        self.host: HostSlots = SimSlots(sizes.host_pages * per_page, geometry)
        self.host_window: HostSlots = SimSlots(sizes.host_window_pages * per_page, geometry)
        shared = None
        if sizes.extent_pages:
            shared = SimSharedMemory.of(sizes, per_page)
            self.host, self.host_window = shared.full, shared.window
        host_rows = self.host.total // per_page
        tier = None
        if host_rows:
            whole = SharedMemory(shared.arena, shared) if shared else None
            tier = HostTier(self.host, self.host_window, whole, sizes.page_bytes(per_page))
        capacity = sizes.device_pages + host_rows
        self.index = index_type(
            geometry,
            capacity,
            self.device,
            tier,
            sizes.policy(),
            eviction=EVERY[sizes.eviction],
            spare=sizes.spare,
            spare_pages=sizes.spare_pages,
            limits=sizes.limits(capacity),
            loops=loops,
            retention=sizes.retention(capacity),
        )
        self.ledger = Ledger(self.index)
        self.lanes = {
            kind: SimLane(kind, self.device, self.host, self.host_window) for kind in TransferKind
        }
        if shared:
            shared.in_flight = self._host_slots_in_flight
        self.running: list[SimRequest] = []
        self.waiting: list[Arrival] = []
        self.seen: set[str] = set()
        self.now = 0.0
        self._pace = pace or Pace()
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self.storage_ledger = StorageLedger(self.index)
        self.storage: SimStorage | None = None
        if sizes.storage_threshold and host_rows:
            self.index.attach_storage(sizes.storage_limits(host_rows))
            self.storage = SimStorage(
                store or SimStore(),
                self.host,
                self.host_window,
                geometry.window_pages,
                storage_faults or StorageFaults(),
                random.Random(seed + 1),
            )
            self.storage.seen = self.seen

    def _host_slots_in_flight(self, component: int) -> list[Slots]:
        transfers = (t for lane in self.lanes.values() for t in lane.submitted)
        slots = [(t.full, t.window)[component].host for t in transfers]
        return slots + (self.storage.in_flight(component) if self.storage else [])

    # ---- requests ------------------------------------------------------------

    def arrive(
        self, tokens: NDArray[np.int64], namespace: object = None, priority: int = 0
    ) -> None:
        """A request gets in line; storage is asked for its prompt."""
        plan = self.index.prefetches.look_up(whole_pages(tokens, self.geometry), namespace)
        op = None
        if isinstance(plan, Prefetch):
            assert self.storage is not None
            op = plan.op
            self.storage.submit_lookup(plan, self.now)
        self.waiting.append(Arrival(tokens, namespace, priority, op))

    def is_ready(self, arrival: Arrival) -> bool:
        """Whether nothing is read for a request any more."""
        plan = None
        if arrival.op is not None:
            plan = self.index.prefetches.find(arrival.op)
        return plan is None or plan.cancelled

    def admit(self, number: int) -> SimRequest:
        """Start a request that waits; storage is not waited for any longer."""
        arrival = self.waiting.pop(number)
        if arrival.op is not None:
            self.index.prefetches.cancel(arrival.op)
        return self.start(arrival.tokens, arrival.namespace, arrival.priority)

    def leave(self, number: int) -> None:
        """A client goes away while its request waits."""
        arrival = self.waiting.pop(number)
        if arrival.op is not None:
            self.index.prefetches.cancel(arrival.op)

    def start(
        self,
        tokens: NDArray[np.int64],
        namespace: object = None,
        priority: int = 0,
        answer: int = 0,
    ) -> SimRequest:
        """Admit a request, with a load from the host if that helps.

        Args:
            answer: so many of the last tokens are its answer, not its prompt.
        """
        geometry, index = self.geometry, self.index
        prompt = len(tokens) - answer
        rest = behind_whole_pages(tokens[: prompt - 1], geometry)
        match = index.match_and_use(whole_pages(tokens[:prompt], geometry), namespace, rest)
        rows = match.rows[: match.device_pages]
        if len(match.rows) > match.device_pages:
            # the engine locks the device prefix while it admits: the fallback must last
            admission = index.hold(rows)
            available = self._available_pages(rows)
            plan = index.begin_load(match.rows)
            admission.release()
            if isinstance(plan, Transfer):
                self._mark("load")
                self.submit(plan)
                rows = match.rows
                left = self._available_pages(rows)
                promised = len(match.rows) - match.device_pages, match.window_pages_to_pin
                assert available[0] - left[0] <= promised[0], "a load takes more than promised"
                assert available[1] - left[1] <= promised[1], "admission was promised too little"
            else:
                self._mark("load declined")
        found = len(rows) * geometry.page_tokens
        if len(rows) == len(match.rows):
            found -= match.cut
        if found % geometry.page_tokens:
            self._mark("resumed inside")
        slots = found // geometry.device_page
        request = SimRequest(
            tokens=tokens,
            prompt=prompt,
            namespace=namespace,
            full=index.table.device.slots[rows].reshape(-1)[:slots].copy(),
            swa=index.table.swa_device.slots[rows].reshape(-1)[:slots].copy(),
            path=rows,
            protected=slots,
            computed=found,
            lock=index.hold(rows),
            # pages another request is loading count as device pages: batches run in
            # order, and the batch of that request waits for its load
            waits_for=index.last_op(TransferKind.LOAD),
            number=next(self._numbers),
            priority=priority,
        )
        self.running.append(request)
        return request

    def _available_pages(self, rows: Rows) -> tuple[int, int]:
        """(full, window) pages free or evictable while the path ``rows`` is locked."""
        table, hold = self.index.table, self.index.hold(rows)
        full = self.device.free_pages() + table.device.n_evictable
        window = self.device.free_window_pages() + table.swa_device.n_evictable
        hold.release()
        return full, window

    def compute(self, request: SimRequest, count: int, *, checkpoint: bool = True) -> None:
        """Prefill up to ``count`` more tokens and checkpoint whole pages; decoding steps
        do not checkpoint.

        Raises:
            DeviceFullError: nothing left to evict; the request is unchanged.
        """
        self._check_contents(request)
        stop = min(len(request.tokens), request.computed + count)
        page, per_page = self.geometry.page_tokens, self.geometry.slots_per_page
        new_slots = -(-stop // page) * per_page - len(request.full)
        if new_slots > 0:
            self._allocate(request, new_slots)
        request.computed = stop
        self._write(request)
        self._slide(request)
        if checkpoint:
            self._checkpoint(request)

    def finish(self, request: SimRequest) -> None:
        """Keep what was computed and free the rest."""
        self._checkpoint(request, finished=True)
        self.index.end_request(request.path, self.geometry.whole_pages_in(request.prompt))
        self.abort(request)

    def abort(self, request: SimRequest) -> None:
        """Free the request's own pages and its lock; also what a retraction does."""
        self._free_own(request, request.protected, len(request.full))
        request.lock.release()
        self.running.remove(request)

    def _allocate(self, request: SimRequest, slots: int) -> None:
        pages = -(-slots // self.geometry.slots_per_page)
        self.index.evict_device(
            pages - self.device.free_pages(),
            pages - self.device.free_window_pages(),
            abandon_backups=True,
        )
        if min(self.device.free_pages(), self.device.free_window_pages()) < pages:
            raise DeviceFullError
        new = self.device.allocate_bound(slots)
        assert new is not None
        request.full = np.concatenate((request.full, new[0]))
        request.swa = np.concatenate((request.swa, new[1]))

    def _write(self, request: SimRequest) -> None:
        """Compute KV: every own slot that is full now holds the request's prefix."""
        tags = self._tags(request)
        own = slice(request.protected, len(tags))
        self.device.full.write(request.full[own], tags[own])
        live = request.swa[own] != ABSENT
        self.device.window.write(request.swa[own][live], tags[own][live])

    def _slide(self, request: SimRequest) -> None:
        """Free own sliding-window slots that no later token reads."""
        dead = max(0, request.computed - self.geometry.retained_tokens) // self.geometry.device_page
        if self.geometry.slots_per_page == 1:
            dead = max(0, dead - 1)
        left = slice(request.protected, max(request.protected, dead))
        self._drop_window(request, left)

    def _drop_window(self, request: SimRequest, slots: slice) -> None:
        live = request.swa[slots] != ABSENT
        if live.any():
            self._mark("slide")
            self.device.release_window(request.full[slots][live], request.swa[slots][live])
            request.swa[slots] = ABSENT

    def _checkpoint(self, request: SimRequest, *, finished: bool = False) -> None:
        geometry = self.geometry
        page, per_page = geometry.page_tokens, geometry.slots_per_page
        named = geometry.named(request.computed)
        count, first = named // page, request.protected // per_page
        end = count * per_page
        if finished and geometry.resumes_inside:
            end = named // geometry.device_page
        if end <= request.protected:
            if self.index.count_request(request.path, request.number, request.priority):
                self._back_up(request.path)
            return
        if not self._make_own(request, first * per_page):
            self._mark("no room for a page of its own")
            return
        for number in range(first, count):
            one = slice(number * per_page, (number + 1) * per_page)
            if (request.swa[one] == ABSENT).any():
                self._drop_window(request, one)
        own = slice(first * per_page, count * per_page)
        rows = self.index.insert(
            pages_of(request.tokens, count, geometry),
            request.namespace,
            first,
            request.full[own].reshape(-1, per_page),
            request.swa[own].reshape(-1, per_page),
            request.number,
            request.priority,
            self._tail(request, count * per_page, end),
        )
        repeat = len(whole_pages(request.tokens[: request.prompt], geometry))
        if first <= repeat <= len(rows):
            self.index.note_prompt_end(rows, repeat)
        if len(rows) > count:
            self._mark("tail")
        table = self.index.table
        protected = min(len(rows) * per_page, end)
        request.full[:protected] = table.device.slots[rows].reshape(-1)[:protected]
        request.swa[:protected] = table.swa_device.slots[rows].reshape(-1)[:protected]
        lock = self.index.hold(rows)
        request.lock.release()
        request.lock, request.path = lock, rows
        request.protected = protected
        request.waits_for = self.index.last_op(TransferKind.LOAD)
        self._back_up(rows)

    def _back_up(self, rows: Rows) -> None:
        if self.index.host_tier is not None:
            self.submit(self.index.begin_backup(rows))

    def _tail(self, request: SimRequest, start: int, end: int) -> Tail | None:
        """What is behind the last whole page, unless the window has left it."""
        behind = slice(start, end)
        if start == end or (request.swa[behind] == ABSENT).any():
            return None
        geometry = self.geometry
        length = end * geometry.device_page + geometry.overlap
        rest = filled_up(behind_pages(request.tokens, length, geometry), geometry.name_tokens)
        return Tail(rest, request.full[behind], request.swa[behind])

    def _make_own(self, request: SimRequest, start: int) -> bool:
        """Slots of its own for what a request reads of the page that it resumed inside."""
        used = request.protected - start
        if used == 0:
            return True
        own = self.index.own(request.path, used, request.lock)
        if own is None:
            return False
        kept = slice(start, request.protected)
        request.full[kept], request.swa[kept], request.lock = own
        request.path, request.protected = request.path[:-1], start
        return True

    def _free_own(self, request: SimRequest, start: int, stop: int) -> None:
        full, swa = request.full[start:stop], request.swa[start:stop]
        live = swa != ABSENT
        self.device.release_window(full[live], swa[live])
        self.device.release(full)

    # ---- transfers -----------------------------------------------------------

    def submit(self, plan: Transfer | Declined | None) -> None:
        """What was begun is copied, at some time."""
        if isinstance(plan, Transfer):
            self._mark(plan.kind.value)
            if plan.failed_here:
                self._mark("host allocation failed")
            self.ledger.begun(plan)
            self.lanes[plan.kind].submit(plan, self.now, self._pace, self._rng)

    def demote(self) -> None:
        """Start copies of what the device evicts next, as in every scheduler step."""
        for plan in self.index.demote_ahead():
            self._mark("demotion")
            self.submit(plan)

    def press_host(self, pages: int = 0, windows: int = 0) -> None:
        """Something needs so much room on the host, whatever has to go."""
        index = self.index
        for space, count in ((index.host, pages), (index.host_window, windows)):
            for claim in (Claim(-(1 << 63), 0.0), Claim(1 << 62, math.inf)) if count else ():
                index.room.make(space, space.free_pages + count, claim)

    def report(self) -> list[int]:
        """What this rank tells the others, see Ledger."""
        backups, loads = self.lanes[TransferKind.BACKUP], self.lanes[TransferKind.LOAD]
        over = {op for op in backups.failed if op <= backups.ended}
        for op in over:
            self.ledger.failed(range(op, op + 1))
        backups.failed -= over
        return self.ledger.report(backups.ended, loads.ended)

    def storage_report(self) -> list[int]:
        """The same for storage, see StorageLedger."""
        return self.storage_ledger.report(int(self.now)) if self.storage else []

    def commit_storage(self, agreed: Sequence[int]) -> None:
        """Apply what all ranks agree on, and start what follows from it."""
        if self.storage is None:
            return
        for prefetch in self.storage_ledger.commit(agreed):
            self._mark("prefetch")
            self.storage_ledger.begun(prefetch)
            self.storage.submit_prefetch(prefetch, self.now)
        for persist in self.index.persists.begin(self.storage_ledger.now_ms):
            self._mark("persist")
            self.storage.submit_persist(persist, self.now)

    @property
    def is_busy(self) -> bool:
        """Whether transfers or storage operations are in flight."""
        return any(self.index.pending.values()) or self.index.n_storage_operations > 0

    def pass_time(self, duration: float) -> None:
        """Copies that are due by then are made, not yet committed."""
        self.now += duration
        for lane in self.lanes.values():
            lane.run_until(self.now)
        if self.storage:
            self.storage.run_until(self.now, self.storage_ledger)

    def copy(self, kind: TransferKind) -> None:
        """Execute the oldest transfer of a direction that was not executed yet."""
        lane = self.lanes[kind]
        if lane.submitted:
            lane.wait_for(lane.submitted[0].op, LAYERS)

    def commit(self, kind: TransferKind, *, ok: bool = True) -> None:
        """Commit the oldest executed transfer of a direction."""
        lane, pending = self.lanes[kind], self.index.pending[kind]
        if not pending or next(iter(pending)) > lane.ended:
            return
        op = next(iter(pending))
        if kind is TransferKind.BACKUP:
            if not ok:
                self.ledger.failed(range(op, op + 1))
            self.ledger.commit([op, -1, *self.report()[2:]])
        else:
            self.ledger.commit([-1, op, *self.report()[2:]])

    def settle(self) -> None:
        """Execute and commit everything in flight."""
        for kind in TransferKind:
            while self.index.pending[kind]:
                self.copy(kind)
                self.commit(kind)

    def reset(self) -> None:
        """A flush: no request runs, but transfers may be in flight."""
        assert not self.running
        for lane in self.lanes.values():
            lane.drain()
        if self.storage:
            self.storage.drain(self.storage_ledger)
        self.report()
        self.device.clear()
        self.host.clear()
        self.host_window.clear()
        self.index.reset()
        self.ledger.reset()
        self.storage_ledger.reset()

    # ---- checks --------------------------------------------------------------

    def _tags(self, request: SimRequest) -> Tags:
        # the token after the last position is known before that has KV, but for the very last one
        tokens = request.tokens[: request.computed + self.geometry.overlap]
        return prefix_tags(tokens, request.namespace, self.geometry)

    def _check_contents(self, request: SimRequest) -> None:
        """A forward pass reads, layer by layer, all full KV and the window before the
        next token; it waits for each layer of the loads its batch depends on."""
        tags = self._tags(request)
        slots = len(tags)
        first = max(0, request.computed - self.geometry.window) // self.geometry.device_page
        window = request.swa[first:slots]
        assert (window != ABSENT).all(), "a page of the window has no KV"
        full = request.full[:slots]
        for number in range(LAYERS):
            self.lanes[TransferKind.LOAD].wait_for(request.waits_for, number)
            layer = slice(number, number + 1)
            assert self.device.full.holds(full, tags, layer), "wrong full-attention KV"
            assert self.device.window.holds(window, tags[first:], layer), "wrong sliding-window KV"

    def check_every_slot(self) -> None:
        """The content oracle over the whole table: every READY copy in every tier
        holds the KV of exactly its own prefix."""
        table = self.index.table
        leaves = np.flatnonzero((table.parent != FREE) & (table.children == 0))
        for leaf in leaves.tolist():
            path = table.path(leaf)
            tags = prefix_tags(table.prompt(path), table.namespace(path), self.geometry)
            tags = tags.reshape(len(path), -1)
            ends = table.tokens[path][:, self.geometry.overlap :: self.geometry.device_page]
            real = ends[:, : self.geometry.slots_per_page] != PAD
            for name, slots, column in (
                ("device", self.device.full, table.device),
                ("swa_device", self.device.window, table.swa_device),
                ("host", self.host, table.host),
                ("swa_host", self.host_window, table.swa_host),
            ):
                ready = column.ready[path]
                held = column.slots[path[ready]][real[ready]]
                fits = slots.holds(held, tags[ready][real[ready]])
                assert fits, f"{name}: a page of another prefix"
            if self.storage is not None:
                for rows, component in ((table.stored, 0), (table.window_stored, 1)):
                    self._check_stored(path, rows[path] == STORED, component)

    def _check_stored(self, path: Rows, stored: NDArray[np.bool_], component: int) -> None:
        """What counts as stored is there, unless storage forgets."""
        assert self.storage is not None
        if not self.storage.forgets:
            keys = self.index.table.storage_keys(path)
            for key in itertools.compress(keys, stored.repeat(self.geometry.slots_per_page)):
                assert (component, key) in self.storage.store.pages, "a stored page is not there"

    def fingerprint(self) -> int:
        """State that must be the same on every rank."""
        return fingerprint(self.index)

    def check(self) -> None:
        """Invariants of the table, and conservation of every slot."""
        invariants.check(self.index)
        table, per_page = self.index.table, self.geometry.slots_per_page
        own = sum(len(r.full) - r.protected for r in self.running)
        own_window = sum(int((r.swa[r.protected :] != ABSENT).sum()) for r in self.running)
        assert self.device.full.used == table.device.n_present * per_page + own
        assert self.device.window.used == table.swa_device.n_present * per_page + own_window
        self._check_locks()
        abandoned = [t for t in self.index.pending[TransferKind.BACKUP].values() if t.abandoned]
        coming = [
            s for p in self.index.prefetches.reading.values() for s in p.stages[p.published :]
        ]
        going = list(self.index.persists.writing.values())
        full = [s.full.slots for s in coming] + [p.full.slots for p in going]
        window = [s.window.slots for s in coming] + [p.window.slots for p in going]
        for slots, column, detached in (
            (self.host, table.host, full + [t.full.host for t in abandoned]),
            (self.host_window, table.swa_host, window + [t.window.host for t in abandoned]),
        ):
            held = np.concatenate([s.reshape(-1) for s in (column.slots, *detached)])
            real = len(np.unique(held[held >= 0]))
            assert slots.used == real, "host slots are lost"

    def _check_locks(self) -> None:
        """Device pages are locked by the running requests and the pending transfers, by
        nobody else."""
        table = self.index.table
        full = np.zeros(table.capacity, dtype=np.int32)
        window = full.copy()
        for request in self.running:
            rows = request.path
            if len(rows):
                assert np.array_equal(table.path(int(rows[-1])), rows), "a path has changed"
                assert table.namespace(rows) == request.namespace
            count = request.protected * self.geometry.device_page
            tokens = table.prompt(rows)[:count] if len(rows) else rows
            assert np.array_equal(tokens, request.tokens[:count]), (
                "a running request lost its prefix"
            )
            full[rows] += 1
            window[self.index.window_of(rows)] += 1
        for kind in TransferKind:
            for transfer in self.index.pending[kind].values():
                if not transfer.abandoned:
                    full[transfer.path] += 1
                    if kind is TransferKind.LOAD:
                        window[self.index.window_of(transfer.path)] += 1
                    else:
                        window[transfer.window.rows] += 1
        assert (full == table.device.locks).all(), "full-attention locks"
        assert (window == table.swa_device.locks).all(), "sliding-window locks"

    def check_idle(self) -> None:
        """With no request and no transfer, nothing is held."""
        assert not self.running
        invariants.check_idle(self.index)
        self.check()

    def _mark(self, event: str) -> None:
        self.seen.add(event)
