"""When to look at what eviction takes next, and what of that to copy to the host first."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.candidates import Kind
from sglang_ext.core.device.demotion import Ahead, Demotion, worth_a_copy
from sglang_ext.core.host.own_room import OwnRoom
from sglang_ext.core.host.room import Freed
from sglang_ext.core.host.sampling import Sampling, passed_over
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.retention.expiry import Expiry, NoExpiry
from sglang_ext.core.table.columns import Rows

STEPS_KEPT = 1024
"""What a step has taken is forgotten after about so many that take less; and its fraction."""
_STEPS_AHEAD = 3
"""Copies are ahead of eviction by what so many steps take."""
STEPS_AFTER_A_FAILURE = 32
"""How long copies ahead of eviction pause: a broken or tiny host must not keep us busy."""
_STEPS_AFTER_A_REFUSAL = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What to copy now.

    Attributes:
        full, window: of each component.
        window_end, with_window: see ``Demotion``; as they are until the next look.
    """

    full: Ahead
    window: Ahead
    window_end: NDArray[np.int64]
    with_window: NDArray[np.bool_]


class LookAhead:
    """Looks at what eviction takes next, when counters say that too little of it may be copied.

    A look costs time in proportion to what eviction takes next. So it says how much may be
    allocated and locked before the next one, and most steps only compare counters.

    Attributes:
        looks: how often it has looked.
    """

    def __init__(
        self,
        residency: Residency,
        log: TransferLog,
        sampling: Sampling,
        policy: BackupPolicy,
        demotion: Demotion,
        expiry: Expiry | NoExpiry,
        own_room: OwnRoom,
    ) -> None:
        self._residency = residency
        self._log = log
        self._sampling = sampling
        self._policy = policy
        self._demotion = demotion
        self._expiry = expiry
        self._own_room = own_room
        self.looks = 0
        # room before the next look, as of the last one, and what has happened to it since
        self._is_due = True
        self._seen: tuple[int, ...] = ()
        self._room_left = self._window_room_left = 0
        self._free_then = self._free_windows_then = 0
        self._evicted = self._evicted_windows = self._held = 0
        self._pause = 0
        # free pages of the device at the last step, and the most that a step has taken of late
        self._free_at_step = self._evicted_in_step = 0
        self._step_share = policy.step_pages * STEPS_KEPT
        # so many steps yet copies are further ahead, since pages were lost
        self._steps_of_care = STEPS_KEPT if policy.step_pages else 0

    # ---- what happens meanwhile ----------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether the host has just refused."""
        return self._pause > 0

    def invalidate(self) -> None:
        """What was found no longer holds: look in the next step."""
        self._is_due = True

    def pause(self, steps: int) -> None:
        """Do not look for so many steps."""
        self._pause = steps

    def take_care(self) -> None:
        """Pages were lost that were worth a copy: be further ahead for a while."""
        self._steps_of_care = STEPS_KEPT

    def note_held(self, pages: int) -> None:
        """Device pages were locked."""
        self._held += pages

    def note_evicted(self, pages: int, windows: int) -> None:
        """Device pages were freed."""
        self._evicted += pages
        self._evicted_in_step += pages
        self._evicted_windows += windows

    def note_room(self, freed: Freed) -> None:
        """Host pages were freed."""
        if freed.copies_of_device:
            # what has no copy any more may be what the device evicts next
            self.invalidate()
        if not freed.is_enough:
            # what was dropped for nothing must not be copied and dropped again at once; and where
            # all is worth more than the claim, not every step has to find that out
            self.pause(STEPS_AFTER_A_FAILURE if freed.pages else _STEPS_AFTER_A_REFUSAL)

    def note_step(self, free: int) -> None:
        """Remember the most that a step takes: copies that are begun now have ended a step or
        two later, so what those take must have its copies before."""
        taken = self._free_at_step + self._evicted_in_step - free
        self._free_at_step, self._evicted_in_step = free, 0
        if taken > 0:
            faded = self._step_share - self._step_share // STEPS_KEPT
            self._step_share = max(taken * STEPS_KEPT, faded)
            self._steps_of_care = max(0, self._steps_of_care - 1)

    # ---- look ----------------------------------------------------------------

    def low_pages(self) -> int:
        """Pages, free ones included, that eviction shall be able to free without a loss: what is
        copied ahead is in both tiers at once, so they are no more than was seen to be needed."""
        policy, ahead = self._policy, _STEPS_AHEAD * self._step_share // STEPS_KEPT
        if not self._steps_of_care:
            return policy.low_pages
        return max(policy.low_pages, min(ahead, policy.most_low_pages))

    def next(self, free: int, free_windows: int, pins: NDArray[np.int16]) -> Found | None:
        """What to copy now; None: there is no need to look.

        Args:
            free, free_windows: pages free on the device.
            pins: (table rows,) locks that pending backups have on each page.
        """
        if self._own_room.take_dropped():
            self.invalidate()
        if not self.is_due(free, free_windows):
            return None
        if self._pause > 0:
            self._pause -= 1
            return None
        state = (free, free_windows, *self._state())
        if state == self._seen and not self._is_due:
            return None
        self._seen = state
        return self.look(free, free_windows, pins)

    def is_due(self, free: int, free_windows: int) -> bool:
        """Whether a look could find too little room: what was allocated and locked since
        the last one is as much as that one allowed for."""
        if self._is_due:
            return True
        used = self._free_then + self._evicted - free
        windows = self._free_windows_then + self._evicted_windows - free_windows
        left = min(self._room_left - used, self._window_room_left - windows)
        return left <= self._held

    def _state(self) -> tuple[int, ...]:
        """Changes with whatever may let a look find something else: where requests hold all of
        the device, room is low for long, and most steps of a decode change nothing."""
        table, backups = self._residency.table, TransferKind.BACKUP
        locked = table.device.n_locked, table.swa_device.n_locked
        return (table.tick, *locked, self._log.last_op(backups), len(self._log.pending[backups]))

    def look(self, free: int, free_windows: int, pins: NDArray[np.int16]) -> Found:
        """See ``next``."""
        self.looks += 1
        self._free_then, self._free_windows_then = free, free_windows
        self._evicted = self._evicted_windows = self._held = 0
        self._is_due = False
        demotion = self._demotion
        # few are marked where the host is full: of the others no more is asked
        demotion.windows_to_save(self._marked(), self.are_worth)
        with_window = demotion.with_window
        pages, windows = self._copying(pins)
        full = demotion.look_ahead(Kind.VICTIMS, self._is_lossy, pages, free, self.low_pages())
        window = demotion.look_ahead(
            Kind.WINDOW_VICTIMS,
            lambda rows: with_window[rows],
            windows,
            free_windows,
            self._policy.low_window_pages,
        )
        self._room_left, self._window_room_left = full.room, window.room
        return Found(full, window, demotion.end_of, with_window)

    def _is_lossy(self, rows: Rows) -> NDArray[np.bool_]:
        """With which pages something is lost that is worth a copy; a page takes its window
        along."""
        lossy: NDArray[np.bool_] = self._demotion.with_window[rows]
        # most of what is about to go has its copy
        rest = np.flatnonzero(~(self._residency.table.host.present[rows] | lossy))
        lossy[rest] = self.are_worth(rows[rest])
        return lossy

    def are_worth(self, rows: Rows) -> NDArray[np.bool_]:
        """Which pages are worth a copy."""
        table = self._residency.table
        worth = worth_a_copy(table, self._policy.write, rows)
        if self._sampling.is_on:
            worth &= ~passed_over(table, rows)
        if self._own_room.is_on:
            worth &= ~self._own_room.passes_over(rows)
        return worth & self._expiry.admits(rows)

    def _copying(self, pins: NDArray[np.int16]) -> tuple[int, int]:
        """Pages, and windows, that pending backups copy and nobody else holds."""
        table = self._residency.table
        copied = [
            transfer
            for transfer in self._log.pending[TransferKind.BACKUP].values()
            if not transfer.abandoned
        ]
        if not copied:
            return 0, 0
        full = np.concatenate([transfer.full.rows for transfer in copied])
        window = np.concatenate([transfer.window.rows for transfer in copied])
        held = table.device.locks[full] == pins[full]
        return int(np.count_nonzero(held)), int(
            np.count_nonzero(table.swa_device.locks[window] == 1)
        )

    def paths(self, found: Found) -> Iterator[tuple[Rows, Rows]]:
        """See ``Demotion.paths``, of what was found."""
        return self._demotion.paths(found.full)

    def note_begun(self, found: Found) -> None:
        """Copies of what was found have been begun, as far as possible."""
        full, window = found.full, found.window
        if self._are_on_host(full.dirty, window.dirty, found.with_window):
            self._room_left, self._window_room_left = full.room_then, window.room_then

    def _are_on_host(self, full: Rows, window: Rows, with_window: NDArray[np.bool_]) -> bool:
        """Whether pages are on the host or on their way, and windows that would be lost."""
        both = np.concatenate((full[with_window[full]], window))
        table = self._residency.table
        return bool(table.host.present[full].all() and table.swa_host.present[both].all())

    def _marked(self) -> Callable[[Rows], NDArray[np.bool_]]:
        """Tells of pages whether their windows are worth a copy now."""
        table = self._residency.table
        free = self._residency.host_window.free_for_copies(needed_now=False)
        if free < table.geometry.window_pages:
            return lambda rows: table.resume[rows]
        return lambda rows: table.resume[rows] | table.resume_if_room[rows]

    def private_state(self) -> list[int]:
        """Numbers that decisions depend on, in two parts; for ``fingerprint``."""
        return [
            *(self._pause, self._room_left, self._window_room_left, self._held),
            *(self._free_at_step, self._step_share, self._steps_of_care),
        ]
