"""A simulated engine: requests against a CacheIndex, with a content oracle.

It does what SGLang's scheduler does to a tree cache: match, lock, load back,
prefill in chunks, decode, slide the window, retract, abort, finish. Every request
checks, before each step, that every slot it is about to read holds the KV of its
own prefix.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core import invariants
from sglang_ext.core.columns import ABSENT, Rows, Slots
from sglang_ext.core.geometry import Geometry
from sglang_ext.core.index import BackupPolicy, CacheIndex, HostTier
from sglang_ext.core.plan import Copies, Hold, Transfer, TransferKind
from sglang_ext.testing.pools import STALE, SimDevicePool, SimSlots, Tags, prefix_tags


class DeviceFullError(Exception):
    """The device has no room; a real engine retracts a request."""


@dataclasses.dataclass(eq=False)
class SimRequest:
    """A running request. Pages ``[0, protected)`` belong to the table."""

    tokens: NDArray[np.int64]
    namespace: object
    full: Slots
    swa: Slots
    protected: int
    computed: int
    lock: Hold
    waits_for: int

    @property
    def done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.computed >= len(self.tokens)


class SimEngine:
    """Requests, pools and transfers around one index."""

    def __init__(
        self,
        geometry: Geometry,
        device_pages: int,
        device_window_pages: int,
        host_pages: int = 0,
        host_window_pages: int = 0,
        checkpoint_pages: int = 4,
        pinned_share: int = 4,
    ) -> None:
        self.geometry = geometry
        self.device = SimDevicePool(device_pages, device_window_pages, geometry)
        per_page = geometry.slots_per_page
        self.host = SimSlots(host_pages * per_page, geometry)
        self.host_window = SimSlots(host_window_pages * per_page, geometry)
        tier = HostTier(self.host, self.host_window) if host_pages else None
        policy = BackupPolicy(
            checkpoint_pages,
            pinned_pages=max(1, device_pages // pinned_share),
            pinned_window_pages=max(1, device_window_pages // pinned_share),
        )
        self.index = CacheIndex(geometry, device_pages + host_pages, self.device, tier, policy)
        self.running: list[SimRequest] = []
        self.in_flight: dict[TransferKind, list[Transfer]] = {kind: [] for kind in TransferKind}
        self.copied: dict[TransferKind, int] = dict.fromkeys(TransferKind, 0)
        self.seen: set[str] = set()

    # ---- requests ------------------------------------------------------------

    def start(self, tokens: NDArray[np.int64], namespace: object = None) -> SimRequest | None:
        """Admit a request, with a load from the host if that helps; None if no room."""
        geometry, index = self.geometry, self.index
        # one token must be left to compute
        count = max(0, len(tokens) - 1) // geometry.page_tokens
        pages = tokens[: count * geometry.page_tokens].reshape(count, geometry.page_tokens)
        match = index.match(pages, namespace)
        rows = match.rows[: match.device_pages]
        index.use(match.rows)
        if len(match.rows) > match.device_pages:
            # the engine locks the device prefix while it admits: the fallback must last
            admission = index.hold(rows)
            available = self._available_window_pages(rows)
            plan = index.begin_load(match.rows)
            admission.release()
            if isinstance(plan, Transfer):
                self._mark("load")
                self.in_flight[TransferKind.LOAD].append(plan)
                rows = match.rows
                lost = available - self._available_window_pages(rows)
                assert lost <= match.window_pages_to_pin, "admission was promised too little"
            else:
                self._mark("load declined")
        request = SimRequest(
            tokens=tokens,
            namespace=namespace,
            full=index.table.device.slots[rows].copy(),
            swa=index.table.swa_device.slots[rows].copy(),
            protected=len(rows),
            computed=len(rows) * geometry.page_tokens,
            lock=index.hold(rows),
            # pages another request is loading count as device pages: batches run in
            # order, and the batch of that request waits for its load
            waits_for=index.last_op(TransferKind.LOAD),
        )
        self.running.append(request)
        return request

    def _available_window_pages(self, rows: Rows) -> int:
        """Window pages free or evictable while the path ``rows`` is locked."""
        hold = self.index.hold(rows)
        pages = self.device.free_window_pages() + self.index.table.swa_device.n_evictable
        hold.release()
        return pages

    def compute(self, request: SimRequest, count: int) -> None:
        """Prefill or decode up to ``count`` more tokens and checkpoint whole pages.

        Raises:
            DeviceFullError: nothing left to evict; the request is unchanged.
        """
        self._check_contents(request)
        stop = min(len(request.tokens), request.computed + count)
        page = self.geometry.page_tokens
        new_pages = -(-stop // page) - len(request.full)
        if new_pages > 0:
            self._allocate(request, new_pages)
        request.computed = stop
        self._write(request)
        self._slide(request)
        self._checkpoint(request)

    def finish(self, request: SimRequest) -> None:
        """Keep what was computed and free the rest."""
        self._checkpoint(request)
        self.abort(request)

    def abort(self, request: SimRequest) -> None:
        """Free the request's own pages and its lock; also what a retraction does."""
        self._free_own(request, request.protected, len(request.full))
        request.lock.release()
        self.running.remove(request)

    def _allocate(self, request: SimRequest, pages: int) -> None:
        self.index.evict_device(
            pages - self.device.free_pages(), pages - self.device.free_window_pages()
        )
        if min(self.device.free_pages(), self.device.free_window_pages()) < pages:
            raise DeviceFullError
        full = self.device.allocate(pages)
        swa = self.device.allocate_window(pages)
        assert full is not None
        assert swa is not None
        self.device.bind_window(full, swa)
        request.full = np.concatenate((request.full, full))
        request.swa = np.concatenate((request.swa, swa))

    def _write(self, request: SimRequest) -> None:
        """Compute KV: every own whole page now holds the request's prefix."""
        tags = self._tags(request)
        own = slice(request.protected, len(tags))
        self.device.full.write(request.full[own], tags[own])
        live = request.swa[own][:, 0] != ABSENT
        self.device.window.write(request.swa[own][live], tags[own][live])

    def _slide(self, request: SimRequest) -> None:
        """Free own sliding-window slots that no later token reads."""
        keep = self.geometry.retained_tokens + self.geometry.page_tokens
        dead = max(0, request.computed - keep) // self.geometry.page_tokens
        for page in range(request.protected, min(dead, len(request.full))):
            if request.swa[page, 0] != ABSENT:
                self._mark("slide")
                one = slice(page, page + 1)
                self.device.release_window(request.full[one], request.swa[one])
                request.swa[page] = ABSENT

    def _checkpoint(self, request: SimRequest) -> None:
        count = request.computed // self.geometry.page_tokens
        first = request.protected
        if count <= first:
            return
        pages = request.tokens[: count * self.geometry.page_tokens].reshape(count, -1)
        own = slice(first, count)
        rows = self.index.insert(
            pages, request.namespace, first, request.full[own], request.swa[own]
        )
        table = self.index.table
        request.full[: len(rows)] = table.device.slots[rows]
        request.swa[: len(rows)] = table.swa_device.slots[rows]
        lock = self.index.hold(rows)
        request.lock.release()
        request.lock = lock
        request.protected = len(rows)
        request.waits_for = self.index.last_op(TransferKind.LOAD)
        if self.index.host_tier is not None:
            plan = self.index.begin_backup(rows)
            if isinstance(plan, Transfer):
                self._mark("backup")
                self.in_flight[TransferKind.BACKUP].append(plan)

    def _free_own(self, request: SimRequest, start: int, stop: int) -> None:
        full, swa = request.full[start:stop], request.swa[start:stop]
        live = swa[:, 0] != ABSENT
        self.device.release_window(full[live], swa[live])
        self.device.release(full)

    # ---- transfers -----------------------------------------------------------

    def copy(self, kind: TransferKind) -> None:
        """Execute the oldest transfer of a direction that was not executed yet."""
        position = self.copied[kind]
        if position < len(self.in_flight[kind]):
            transfer = self.in_flight[kind][position]
            self._copy(transfer.full, self.device.full, self.host, kind)
            self._copy(transfer.window, self.device.window, self.host_window, kind)
            self.copied[kind] = position + 1

    def commit(self, kind: TransferKind, *, ok: bool = True) -> None:
        """Commit the oldest executed transfer of a direction."""
        if self.copied[kind] == 0:
            return
        transfer = self.in_flight[kind].pop(0)
        self.copied[kind] -= 1
        if kind is TransferKind.LOAD:
            self.index.commit_load(transfer.op)
        else:
            if not ok:  # a failed copy leaves anything behind
                self.host.content[transfer.full.host] = STALE
                self.host_window.content[transfer.window.host] = STALE
            self.index.commit_backup(transfer.op, ok=ok)

    def settle(self) -> None:
        """Execute and commit everything in flight."""
        for kind in TransferKind:
            while self.in_flight[kind]:
                self.copy(kind)
                self.commit(kind)

    @staticmethod
    def _copy(copies: Copies, device: SimSlots, host: SimSlots, kind: TransferKind) -> None:
        if kind is TransferKind.LOAD:
            device.content[copies.device] = host.content[copies.host]
        else:
            host.content[copies.host] = device.content[copies.device]

    # ---- checks --------------------------------------------------------------

    def _tags(self, request: SimRequest) -> Tags:
        tokens = request.tokens[: request.computed]
        return prefix_tags(tokens, request.namespace, self.geometry)

    def _check_contents(self, request: SimRequest) -> None:
        """A forward pass reads all full KV, and the window before the next token."""
        while self.copied[TransferKind.LOAD] < len(self.in_flight[TransferKind.LOAD]):
            if self.in_flight[TransferKind.LOAD][0].op > request.waits_for:
                break
            self.copy(TransferKind.LOAD)
            self.commit(TransferKind.LOAD)
        tags = self._tags(request)
        pages = len(tags)
        assert self.device.full.holds(request.full[:pages], tags), "wrong full-attention KV"
        first = max(0, request.computed - self.geometry.window) // self.geometry.page_tokens
        window = request.swa[first:pages]
        assert (window != ABSENT).all(), "a page of the window has no KV"
        assert self.device.window.holds(window, tags[first:]), "wrong sliding-window KV"

    def check(self) -> None:
        """Invariants of the table, and conservation of every slot."""
        invariants.check(self.index)
        table, per_page = self.index.table, self.geometry.slots_per_page
        own = sum(len(r.full) - r.protected for r in self.running)
        own_window = sum(int((r.swa[r.protected :, 0] != ABSENT).sum()) for r in self.running)
        assert self.device.full.used == (table.device.n_present + own) * per_page
        assert self.device.window.used == (table.swa_device.n_present + own_window) * per_page
        assert self.host.used == table.host.n_present * per_page
        assert self.host_window.used == table.swa_host.n_present * per_page

    def check_idle(self) -> None:
        """With no request and no transfer, nothing is held."""
        assert not self.running
        invariants.check_idle(self.index)
        self.check()

    def _mark(self, event: str) -> None:
        self.seen.add(event)
