"""The prefix cache: what the scheduler calls. It builds the objects that decide, and decides
nothing itself.

A transfer is *begun* (slots reserved, rows held), executed elsewhere, and *committed*; nothing
is published before its commit. The cache decides and accounts, it never copies a byte.
"""

from collections.abc import Callable, Hashable

from sglang_ext.core.compiled.loop_sets import COMPILED, Loops
from sglang_ext.core.control.drops import Drops
from sglang_ext.core.control.pins import Pins
from sglang_ext.core.counters import Counters
from sglang_ext.core.device.demotion import Demotion
from sglang_ext.core.device.eviction import DeviceEviction
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.device.victims import NO_SPARE, Spare
from sglang_ext.core.eviction_policy import EvictionPolicy
from sglang_ext.core.host.kept import KeptWindows
from sglang_ext.core.host.own_room import OwnRoom
from sglang_ext.core.host.quotas import Quotas
from sglang_ext.core.host.room import HostRoom
from sglang_ext.core.host.sampling import Sampling
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.host.tier import HostTier
from sglang_ext.core.inserts import Inserts, Own, Tail
from sglang_ext.core.moves.backups import Backups
from sglang_ext.core.moves.loads import Loads
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.plan import Declined, Hold, PrefixMatch, Transfer, TransferKind
from sglang_ext.core.ports import Departures, DevicePool
from sglang_ext.core.residency import Residency
from sglang_ext.core.retention.expiry import Expiry, NoExpiry
from sglang_ext.core.retention.retention import Retention
from sglang_ext.core.sessions import Sessions
from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.storage.keys import Key
from sglang_ext.core.storage.persists import Persists
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.core.storage.prefetches import Prefetches
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import Page
from sglang_ext.core.table.row_memory import RowMemory
from sglang_ext.core.table.table import NO_LESS, AgeLimits, PageTable
from sglang_ext.core.write_policy import WritePolicy


class PrefixCache:
    """The table, what is where, and all transfers.

    Attributes:
        geometry: sizes of pages and windows.
        device_pool: device slots.
        host_tier: None without a host.
        policy: what is backed up when.
        eviction_policy: what is evicted first.
        counters: what has happened.
        attachment: the storage tier.
        pinned_share: of the host that pins may take, from 0 to 1.
        quotas: of namespaces.
        log: transfers in flight.
        expiry: when pages expire, if the eviction policy is learned.
        table, kept, host, host_window: see Residency.
        residency, sampling, room, own_room, ahead, persists, backups, eviction, loads, inserts,
            prefetches, sessions, pins, drops: the objects that decide; others after each flush.

    Args:
        spare_pages: see PageTable.
        limits, loops, retention: what only tests choose.
    """

    def __init__(  # noqa: PLR0913
        self,
        geometry: Geometry,
        capacity: int,
        device: DevicePool,
        host: HostTier | None = None,
        policy: BackupPolicy | None = None,
        eviction: EvictionPolicy = EvictionPolicy.LRU,
        spare: Spare = NO_SPARE,
        *,
        spare_pages: int = 0,
        pinned_share: float = 0.25,
        limits: AgeLimits = NO_LESS,
        loops: Loops = COMPILED,
        retention: Retention | None = None,
    ) -> None:
        self.geometry = geometry
        self.device_pool = device
        self.host_tier = host
        self.policy = policy or BackupPolicy(
            WritePolicy.WRITE_THROUGH, capacity, capacity, capacity, 0, 0
        )
        self.counters = Counters()
        self.quotas = Quotas(host.page_bytes if host else (1, 1))
        self.attachment = Attachment()
        self.log = TransferLog()
        self._capacity = capacity
        self.eviction_policy, self._limits, self._spare = eviction, limits, spare
        self._loops = loops
        self._memory = RowMemory()
        self.spare_pages = spare_pages
        self.pinned_share = pinned_share
        self._departures: Departures | None = None
        self.expiry: Expiry | NoExpiry = NoExpiry()
        if eviction is EvictionPolicy.LEARNED:
            self.expiry = Expiry(
                retention or Retention([capacity]),
                self.policy.checkpoint_pages,
                self.policy.window_cost,
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything and free nothing; the pools are reset by their owners.

        No transfer may be in flight.
        """
        table = PageTable(
            self.geometry,
            self._capacity,
            self.eviction_policy,
            self._limits,
            self._loops,
            self._memory,
            self.spare_pages,
        )
        table.name_namespaces(self.attachment.seed)
        log, attachment, policy = self.log, self.attachment, self.policy
        log.clear()
        residency = Residency(table, self.device_pool, self.host_tier, self.counters)
        residency.tell_departures(self._departures)
        self.table: PageTable = table
        self.kept: KeptWindows = residency.kept
        self.host: HostSpace = residency.host
        self.host_window: HostSpace = residency.host_window
        self.residency = residency
        self.sampling = Sampling(table.host if self.host_tier else None, attachment)
        self.expiry.watch(residency, attachment)
        self.room = HostRoom(residency, self.sampling, self.expiry, is_ample=policy.host_is_ample)
        self.own_room = own_room = OwnRoom(residency, self.quotas)
        demotion = Demotion(table, residency.candidates)
        self.ahead = LookAhead(
            residency, log, self.sampling, policy, demotion, self.expiry, own_room
        )
        self.persists = Persists(residency, attachment)
        self.backups = Backups(
            residency, self.room, own_room, self.ahead, log, attachment, self.persists, policy
        )
        self.eviction = DeviceEviction(
            residency,
            self.backups,
            self.ahead,
            log,
            self.sampling,
            policy.write,
            self._spare,
            self.expiry,
        )
        self.loads = Loads(residency, self.eviction, self.ahead, log, self.sampling)
        self.inserts = Inserts(residency, self.eviction, self.ahead, policy.checkpoint_pages)
        self.prefetches = Prefetches(residency, self.room, own_room, self.ahead, attachment)
        self.sessions = Sessions(residency)
        self.pins = Pins(residency, self.backups, self.quotas, self.pinned_share)
        self.drops = Drops(residency, self.backups, self.ahead, log, self.pins)

    # ---- what a request does -------------------------------------------------

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """Best resume point for a prompt of ``pages`` (n, name_tokens), and of ``rest`` behind
        them, see ``PageTable.match``. Read-only."""
        return self.table.match(pages, namespace, rest)

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """The same for a request, which uses what is found."""
        match = self.table.match_and_use(pages, namespace, rest)
        if self.host_tier is not None:  # on a device alone, what is used is looked at late
            self.residency.used(match.rows)
        return match

    def hold(self, rows: Rows) -> Hold:
        """See ``Inserts.hold``."""
        return self.inserts.hold(rows)

    def window_of(self, rows: Rows) -> Rows:
        """See ``Residency.window_of``."""
        return self.residency.window_of(rows)

    def own(self, path: Rows, used: int, hold: Hold) -> Own | None:
        """See ``Inserts.own``."""
        return self.inserts.own(path, used, hold)

    def insert(
        self,
        pages: Pages,
        namespace: Hashable,
        first_owned: int,
        full: Slots,
        swa: Slots,
        request: int,
        priority: int = 0,
        tail: Tail | None = None,
    ) -> Rows:
        """See ``Inserts.insert``."""
        return self.inserts.insert(
            pages, namespace, first_owned, full, swa, request, priority, tail
        )

    def count_request(self, rows: Rows, request: int, priority: int = 0) -> bool:
        """See ``Inserts.count_request``."""
        return self.inserts.count_request(rows, request, priority)

    def note_prompt_end(self, rows: Rows, pages: int) -> None:
        """See ``Inserts.note_prompt_end``."""
        self.inserts.note_prompt_end(rows, pages)

    def end_request(self, rows: Rows, prompt: int) -> None:
        """See ``Expiry.ended``."""
        self.expiry.ended(rows, prompt)

    # ---- device and host -----------------------------------------------------

    def evict_device(
        self, pages: int, window_pages: int, *, abandon_backups: bool = False
    ) -> tuple[int, int]:
        """See ``DeviceEviction.evict``."""
        return self.eviction.evict(pages, window_pages, abandon_backups=abandon_backups)

    def begin_backup(self, rows: Rows) -> Transfer | Declined | None:
        """See ``Backups.begin_for_request``."""
        return self.backups.begin_for_request(rows)

    def demote_ahead(self) -> list[Transfer]:
        """See ``Backups.demote_ahead``; once a step. What is beyond quotas goes first."""
        self.own_room.step()
        return self.backups.demote_ahead()

    def begin_load(self, rows: Rows) -> Transfer | Declined:
        """See ``Loads.begin``."""
        return self.loads.begin(rows)

    def commit_backup(self, op: int, *, ok: bool) -> None:
        """See ``Backups.commit``."""
        self.backups.commit(op, ok=ok)

    def commit_load(self, op: int) -> None:
        """See ``Loads.commit``."""
        self.loads.commit(op)

    @property
    def pending(self) -> dict[TransferKind, dict[int, Transfer]]:
        """See TransferLog."""
        return self.log.pending

    def last_op(self, kind: TransferKind) -> int:
        """See TransferLog."""
        return self.log.last_op(kind)

    # ---- storage -------------------------------------------------------------

    def attach_storage(self, limits: StorageLimits) -> None:
        """There is storage from now on; what the host has is written there."""
        self.attachment.attach(limits)
        self.persists.queue_all()

    def detach_storage(self) -> None:
        """There is no storage any more; nothing may be in flight."""
        busy = self.n_storage_operations
        assert busy == 0, f"{busy} storage operations are in flight"
        self.attachment.detach()
        self.persists.forget_waiting()
        self.persists.forget_stored()

    def suspend_storage(self) -> None:
        """Look for nothing and write nothing, until storage is attached again: what is in the
        table is not what storage would take it for. Reads in flight are of no use any more;
        what is being written ends."""
        self.attachment.suspend()
        self.persists.forget_waiting()
        self.prefetches.cancel_all()

    @property
    def n_storage_operations(self) -> int:
        """Lookups, prefetches and persists in flight."""
        reads = len(self.prefetches.lookups) + len(self.prefetches.reading)
        return len(self.persists.writing) + reads

    def name_namespaces(self, seed: Callable[[Hashable], Key]) -> None:
        """Let the keys of a namespace begin with something else; before there are any."""
        self.attachment.name_namespaces(seed)
        self.table.name_namespaces(seed)

    # ---- for metrics ---------------------------------------------------------

    def tell_departures(self, departures: Departures) -> None:
        """Tell somebody which pages leave, from now on and after each flush."""
        self._departures = departures
        self.residency.tell_departures(departures)

    # ---- for tests -----------------------------------------------------------

    def private_state(self) -> list[int]:
        """Numbers beside the table that decisions depend on; for ``fingerprint``."""
        spaces = (self.host, self.host_window) if self.host_tier else ()
        attachment = self.attachment
        pause, room, window_room, held, *steps = self.ahead.private_state()
        return [
            *(pause, room, window_room, held, self.backups.n_late, *steps),
            self.sampling.lost,
            *(space.detached for space in spaces),
            *(attachment.next_persist, attachment.next_prefetch, attachment.paused_until),
            *(self.prefetches.pages, self.persists.pages, self.persists.n_waiting),
            *self.expiry.private_state(),
            *self.own_room.private_state(),
        ]
