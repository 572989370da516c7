"""What the parts of the index share: the table, the pools, transfers in flight."""

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable

import numpy as np

from sglang_ext.core.arena import Arena, ArenaPool
from sglang_ext.core.checkpoints import Checkpoints
from sglang_ext.core.columns import Rows, resident_zeros
from sglang_ext.core.compiled.table import CompiledTable
from sglang_ext.core.counters import Counters
from sglang_ext.core.eviction import NO_SPARE, Spare
from sglang_ext.core.eviction_policy import Rank, lru
from sglang_ext.core.geometry import Geometry
from sglang_ext.core.host_space import HostSpace
from sglang_ext.core.paths import PathTable
from sglang_ext.core.plan import Copies, Declined, DeclineReason, Hold, Transfer, TransferKind
from sglang_ext.core.ports import DevicePool, HostMemory, HostPool
from sglang_ext.core.sampling import Sampling
from sglang_ext.core.storage_keys import Key, namespace_seed
from sglang_ext.core.storage_plan import Persist, Prefetch, StorageLimits
from sglang_ext.core.table import NO_LESS, AgeLimits
from sglang_ext.core.write_policy import WritePolicy

_PINNED_SHARE = 2
"""Backups in flight may pin one in this many device pages."""
_LOW_SHARE = 4
"""Pages are copied ahead of eviction up to one in this many device pages."""
_AHEAD_SHARE = 12
"""And not more than one in this many host pages,"""
_MOST_AHEAD_SHARE = 4
"""or, where single steps take more, in this many of those that the device would not fill."""

STEPS_KEPT = 1024
"""What a step has taken is forgotten after about so many that take less; and its fraction."""
_MOST_LATE = 1024
"""Paths whose copy was put off; beyond, the oldest one waits until its eviction is near."""
_MOST_WAITING = 4096
"""Paths that wait for storage; beyond, the oldest one is forgotten until it grows."""
FIRST_PAUSE_MS = 100
"""Storage is left alone for so long when a persist has failed; then twice as long."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostTier:
    """The host memory of a cache with a host tier.

    Attributes:
        full, window: a pool for each component.
        shared: the memory that they share, None if each has its own.
    """

    full: HostPool
    window: HostPool
    shared: "SharedMemory | None" = None

    @classmethod
    def on(cls, arena: Arena, memory: HostMemory) -> "HostTier":
        """Both components in one memory."""
        return cls(ArenaPool(arena, 0), ArenaPool(arena, 1), SharedMemory(arena, memory))


@dataclasses.dataclass(frozen=True, slots=True)
class SharedMemory:
    """One memory for both components: component 0 is full attention, 1 the windows."""

    arena: Arena
    memory: HostMemory


@dataclasses.dataclass(frozen=True, slots=True)
class BackupPolicy:
    """What is backed up when, and how much of the device that may hold up.

    Attributes:
        write: when a page is copied to the host.
        checkpoint_pages: distance of the windows kept inside a prompt; 0 keeps none there.
        dense_pages: the same while the host has free room; 0 keeps no more then.
        pinned_pages: device pages that pending backups may copy. The paths that lead to these
            are held as well, until the copies have been made.
        pinned_window_pages: the same for sliding-window copies.
        low_pages: device pages, free ones included, that eviction shall be able to free
            before it meets one without a host copy; made good when a third of them are used.
        low_window_pages: the same for sliding-window copies.
        most_low_pages: where single steps take more than that, they are as many as this.
        step_pages: what a step is taken to need before any was seen.
    """

    write: WritePolicy
    checkpoint_pages: int
    pinned_pages: int
    pinned_window_pages: int
    low_pages: int
    low_window_pages: int
    most_low_pages: int = 0
    step_pages: int = 0
    dense_pages: int = 0

    @classmethod
    def for_device(
        cls,
        write: WritePolicy,
        checkpoint_pages: int,
        pages: int,
        window_pages: int,
        host_pages: int,
        dense_pages: int = 0,
        step_pages: int = 0,
    ) -> "BackupPolicy":
        """What a server with so many device pages of each component runs with.

        Args:
            host_pages: full-attention pages that the host has room for.
            step_pages: most that a step prefills.
        """
        # what is copied ahead is in both tiers at once
        ahead = host_pages // _AHEAD_SHARE
        return cls(
            write=write,
            checkpoint_pages=checkpoint_pages,
            pinned_pages=pages // _PINNED_SHARE,
            pinned_window_pages=window_pages // _PINNED_SHARE,
            low_pages=min(pages // _LOW_SHARE, ahead),
            low_window_pages=min(window_pages // _LOW_SHARE, ahead),
            most_low_pages=min(pages // _PINNED_SHARE, (host_pages - pages) // _MOST_AHEAD_SHARE),
            dense_pages=dense_pages,
            # other policies have made their copies by then
            step_pages=max(0, step_pages) if write is WritePolicy.WRITE_BACK else 0,
        )


class IndexState:
    """The state, and the small steps that every part is made of.

    Attributes:
        table_type: CompiledTable, or its reference ``PathTable``.
        spare: what evictions from the device may free beyond what is asked for.
        storage_is_suspended: see ``Prefetches.suspend_storage``.
    """

    table_type: type[PathTable] = CompiledTable

    def __init__(
        self,
        geometry: Geometry,
        capacity: int,
        device: DevicePool,
        host: HostTier | None = None,
        policy: BackupPolicy | None = None,
        rank: Rank = lru,
        spare: Spare = NO_SPARE,
        limits: AgeLimits = NO_LESS,
    ) -> None:
        self.geometry = geometry
        self.spare = spare
        self.device_pool = device
        self.host_tier = host
        self.policy = policy or BackupPolicy(
            WritePolicy.WRITE_THROUGH, capacity, capacity, capacity, 0, 0
        )
        self.counters = Counters()
        self.storage: StorageLimits | None = None
        self.storage_is_suspended = False
        self._seed: Callable[[Hashable], Key] = namespace_seed
        self._next_persist = self._next_prefetch = 0
        self._storage_pause_ms, self._storage_paused_until = FIRST_PAUSE_MS, 0
        self._capacity = capacity
        self._rank, self._limits = rank, limits
        # operation numbers go on across a reset: they identify transfers for good
        self._next_op = dict.fromkeys(TransferKind, 0)
        self.reset()

    def reset(self) -> None:
        """Forget everything and free nothing; the pools are reset by their owners.

        No transfer may be in flight.
        """
        table = self.table_type(self.geometry, self._capacity, self._rank, self._limits)
        table.seed = self._seed
        self.table = table
        self._device_victims = table.victims(table.device, table.age)
        self._swa_device_victims = table.victims(table.swa_device, table.swa_age)
        self.checkpoints = Checkpoints(table, self.geometry.window_pages)
        self._demotion = table.demotion_type(table, self.checkpoints)
        if (tier := self.host_tier) is not None:
            self.host = HostSpace(table.host, tier.full)
            self.host_window = HostSpace(table.swa_host, tier.window)
        self.pending: dict[TransferKind, dict[int, Transfer]] = {
            TransferKind.BACKUP: {},
            TransferKind.LOAD: {},
        }
        self.persists: dict[int, Persist] = {}
        self.lookups: dict[int, Prefetch] = {}
        self.prefetches: dict[int, Prefetch] = {}
        self._prefetched_pages = self._persisted_pages = 0
        # (last row, its generation) of paths that wait until storage takes them
        self._to_persist: deque[tuple[int, int]] = deque()
        # backups that pin a page on the device, and how many pages are being copied
        self._pins = resident_zeros(self._capacity, np.int16)
        self._copied_pages = 0
        self._pinned_window_pages = 0
        # room before the next scan, as of the last one, and what has happened to it since
        self._scan_is_due = True
        self._scanned: tuple[int, ...] = ()
        self._room_left = self._window_room_left = 0
        self._free_at_scan = self._free_windows_at_scan = 0
        self._evicted = self._evicted_windows = self._held = 0
        self._pause = 0
        # free pages of the device at the last step, and the most that a step has taken of late
        self._free_at_step = self._evicted_in_step = 0
        self._step_share = self.policy.step_pages * STEPS_KEPT
        # so many steps yet copies are further ahead, since pages were lost
        self._steps_of_care = STEPS_KEPT if self.policy.step_pages else 0
        # (last row, its generation) of paths whose copy was due while others were being made
        self._late: deque[tuple[int, int]] = deque(maxlen=_MOST_LATE)
        # pages that were being copied when one of them was last refused
        self._refused_at = 1 << 62
        self._sampling = Sampling()

    @property
    def is_sampling(self) -> bool:
        """Whether copies ahead of eviction are a sample. Never with storage: a prefix that is not
        read on this host may be read by others, or a day later."""
        if self.host_tier is None or self.storage is not None:
            return False
        return self._sampling.is_on(self.table.host.n_present)

    # ---- use and hold --------------------------------------------------------

    def use(self, rows: Rows) -> None:
        """Record that a request uses the prefix ``rows`` and the window at its end."""
        if len(rows) == 0:
            return
        self.table.advance()
        self._refresh(rows)

    def _refresh(self, rows: Rows) -> None:
        """A path is used now. Who ranks pages above age may put it before a victim that is
        known already, though it is younger."""
        self.table.use(rows)
        self._used(rows)

    def _used(self, rows: Rows) -> None:
        if self._rank is not lru:
            self.table.device.offer(rows)

    def window_of(self, rows: Rows) -> Rows:
        """The last window of a path: what resuming at its end reads."""
        return rows[max(0, len(rows) - self.geometry.window_pages) :]

    def hold(self, rows: Rows) -> Hold:
        """Lock a path: full attention to the root, sliding window for its end."""
        table = self.table
        self._held += len(rows)
        return Hold(
            (table.device, rows),
            (table.swa_device, self.window_of(rows)),
        )

    # ---- forget --------------------------------------------------------------

    def _drop_device_windows(self, rows: Rows) -> int:
        table = self.table
        if len(rows):
            on_host = int(np.count_nonzero(table.swa_host.present[rows]))
            self.counters.dropped_window_pages += len(rows) - on_host
            swa = table.swa_device.take(rows)
            self.device_pool.release_window(table.device.slots[rows], swa)
        return len(rows)

    def _remove(self, rows: Rows) -> tuple[int, int]:
        """Forget rows without a full copy, and everything below them.

        Returns:
            Device (pages, window pages) freed below ``rows``.
        """
        if len(rows) == 0:
            return 0, 0
        table = self.table
        rows = table.subtree(rows)
        assert not table.device.locks[rows].any(), "removed a locked page"
        device = rows[table.device.present[rows]]
        windows = self._drop_device_windows(rows[table.swa_device.present[rows]])
        if len(device):
            self.device_pool.release(table.device.take(device))
        if self.host_tier is not None:
            self.counters.unsaved_pages += int(np.count_nonzero(~table.host.ready[device]))
            # storage may still read them: it holds their slots, see ``HostSpace.pin``
            table.host.break_locks(rows)
            table.swa_host.break_locks(rows)
            self._forget_windows(rows[self.checkpoints.ends[rows]])
            self.host.drop(rows[table.host.present[rows]])
        table.remove_rows(rows)
        self.counters.dropped_pages += len(rows)
        return len(device), windows

    def _forget_windows(self, ends: Rows) -> int:
        """Keep windows on the host no longer; returns how many of their pages are free."""
        freed = 0
        for end in ends.tolist():
            freed += self._drop_unneeded(self.checkpoints.remove(end))
        return freed

    def _drop_unneeded(self, rows: Rows) -> int:
        """Drop window pages on the host that no kept window needs and no transfer uses."""
        if len(rows) == 0:
            return 0
        column = self.table.swa_host
        unneeded = column.ready[rows] & (self.checkpoints.uses[rows] == 0)
        rows = rows[unneeded & (column.locks[rows] == 0)]
        self.host_window.drop(rows)
        return len(rows)

    def private_state(self) -> list[int]:
        """Numbers beside the table that decisions depend on; for ``fingerprint``."""
        detached = [self.host.detached, self.host_window.detached] if self.host_tier else []
        storage = [self._next_persist, self._next_prefetch, self._storage_paused_until]
        storage += [self._prefetched_pages, self._persisted_pages, len(self._to_persist)]
        room = [self._pause, self._room_left, self._window_room_left, self._held]
        room += [len(self._late), self._free_at_step, self._step_share, self._steps_of_care]
        return [*room, self._sampling.lost, *detached, *storage]

    # ---- storage -------------------------------------------------------------

    def name_namespaces(self, seed: Callable[[Hashable], Key]) -> None:
        """Let the keys of a namespace begin with something else; before there are any."""
        self._seed = self.table.seed = seed

    def queue_persist(self, path: Rows) -> None:
        """Note a path that has new pages on the host."""
        if self.storage is None or self.storage_is_suspended or len(path) == 0:
            return
        if len(self._to_persist) == _MOST_WAITING:
            self._to_persist.popleft()
            self._decline(DeclineReason.STORAGE_BACKLOG)
        last = int(path[-1])
        self._to_persist.append((last, int(self.table.generation[last])))

    # ---- transfers -----------------------------------------------------------

    def last_op(self, kind: TransferKind) -> int:
        """Number of the last transfer begun in a direction, -1 before the first."""
        return self._next_op[kind] - 1

    def _begin(
        self, kind: TransferKind, full: Copies, window: Copies, hold: Hold, path: Rows
    ) -> Transfer:
        op = self._next_op[kind]
        self._next_op[kind] = op + 1
        transfer = Transfer(op, kind, full, window, hold, path)
        self.pending[kind][op] = transfer
        return transfer

    def _decline(self, reason: DeclineReason) -> Declined:
        self.counters.declined[reason] += 1
        return Declined(reason)
