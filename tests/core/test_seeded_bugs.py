"""The test of the tests: each bug seeded here must be found by the seeded traffic."""

import dataclasses
import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.candidates import Candidates
from sglang_ext.core.compiled.constants import PAD, TICK_SHIFT
from sglang_ext.core.compiled.loop_sets import Loops
from sglang_ext.core.device.eviction import DeviceEviction
from sglang_ext.core.host.arena import Arena, ArenaShape
from sglang_ext.core.host.kept import Forgotten, KeptWindows
from sglang_ext.core.host.room import Claim, HostRoom
from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.host.tails import Tails
from sglang_ext.core.inserts import Inserts
from sglang_ext.core.moves import backups as backups_module
from sglang_ext.core.moves.backups import Backups
from sglang_ext.core.moves.ledger import Ledger
from sglang_ext.core.moves.loads import Loads
from sglang_ext.core.plan import Copies, Hold, PrefixMatch, Transfer, TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import SlotColumn
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable
from sglang_ext.testing.interpreted import INTERPRETED
from sglang_ext.testing.pools import SimDevicePool, SimSlots
from sglang_ext.testing.shared_memory import SimSharedMemory
from sglang_ext.testing.simulation import Simulation

Patch = pytest.MonkeyPatch
PATHS = INTERPRETED.paths
SEEDS, STEPS = 150, 600
FIRST = (3, 5, 78, 12, 17, 14, 19, 8, 18, 7, 21, 138)
"""Seeds that find what few others do; they come first."""


def window_one_page_short(patch: Patch) -> None:
    original = PATHS.deepest_resume
    patch.setattr(PATHS, "deepest_resume", lambda has, pages: original(has, max(1, pages - 1)))


def match_ignores_windows(patch: Patch) -> None:
    patch.setattr(PATHS, "deepest_resume", lambda has, pages: len(has))


def lock_covers_one_page_less_of_the_window(patch: Patch) -> None:
    def hold(self: Residency, rows: Any) -> Hold:
        return Hold((self.table.device, rows), (self.table.swa_device, self.window_of(rows)[1:]))

    patch.setattr(Residency, "hold", hold)


def ages_forget_the_depth(patch: Patch) -> None:
    patch.setattr(PATHS, "age_of", lambda c, row, tick: tick << TICK_SHIFT)


def victims_are_known_by_ages_from_before(patch: Patch) -> None:
    patch.setattr(Candidates, "note_all", lambda self: None)


def who_is_used_keeps_its_place(patch: Patch) -> None:
    patch.setattr(Residency, "used", lambda self, rows: None)


def locks_are_not_told(patch: Patch) -> None:
    def lock(self: SlotColumn, rows: Any) -> None:
        self.loops.slots.lock(self.present, self.locks, self._counts, rows)

    patch.setattr(SlotColumn, "lock", lock)


def kept_windows_are_not_told(patch: Patch) -> None:
    patch.setattr(KeptWindows, "_note", lambda self, path: None)


def a_tail_that_stays_is_not_put_back(patch: Patch) -> None:
    patch.setattr(Tails, "put_back", lambda self, rows: None)


def a_priority_takes_32_bits(patch: Patch) -> None:
    original = PageTable.priority_rank

    def rank(self: PageTable, requested: int) -> int:
        return original(self, int(np.int64(requested).astype(np.int32)))

    patch.setattr(PageTable, "priority_rank", rank)


def descendants_of_a_lost_page_stay(patch: Patch) -> None:
    patch.setattr(Candidates, "with_descendants", lambda self, rows: rows)


def windows_outlive_their_page(patch: Patch) -> None:
    def demote(self: DeviceEviction, rows: Any) -> tuple[int, int]:
        table = self._residency.table
        self._residency.device_pool.release(table.device.take(rows))
        lost = rows[~table.host.present[rows]]
        return (len(rows), 0) if not len(lost) else self._residency.remove(lost)

    patch.setattr(DeviceEviction, "_demote", demote)


def host_evicts_what_is_being_loaded(patch: Patch) -> None:
    original = Loads.begin

    def begin(self: Loads, rows: Any) -> Any:
        plan = original(self, rows)
        if hasattr(plan, "hold"):
            host = (self._table.host, self._table.swa_host)
            for column, held in [part for part in plan.hold._parts if part[0] in host]:
                column.unlock(held)
            plan.hold._parts = tuple(part for part in plan.hold._parts if part[0] not in host)
        return plan

    patch.setattr(Loads, "begin", begin)


def backup_does_not_hold_its_path(patch: Patch) -> None:
    original = Backups.begin

    def begin(self: Backups, rows: Any, **options: Any) -> Any:
        plan = original(self, rows, **options)
        if hasattr(plan, "hold"):
            table = self._table
            device = [part for part in plan.hold._parts if part[0] is table.device]
            for column, held in device:
                column.unlock(held)
            plan.hold._parts = tuple(p for p in plan.hold._parts if p[0] is not table.device)
        return plan

    patch.setattr(Backups, "begin", begin)


def a_failed_backup_is_published(patch: Patch) -> None:
    original = Backups.commit
    patch.setattr(Backups, "commit", lambda self, op, *, ok: original(self, op, ok=True))


def duplicates_are_not_given_back(patch: Patch) -> None:
    original = Residency.adopt

    def adopt(self: Residency, rows: Any, full: Any, swa: Any) -> None:
        missing = ~self.table.device.present[rows]
        original(self, rows[missing], full[missing], swa[missing])

    patch.setattr(Residency, "adopt", adopt)


def revived_window_replaces_a_live_one(patch: Patch) -> None:
    def adopt(self: Residency, rows: Any, full: Any, swa: Any) -> None:
        missing = ~self.table.device.present[rows]
        self.give(rows[missing], full[missing], swa[missing])
        rows, full, swa = rows[~missing], full[~missing], swa[~missing]
        live = swa[:, 0] != -1
        self.device_pool.move_window(full[live], self.table.device.slots[rows[live]], swa[live])
        self.table.swa_device.put(rows[live], swa[live], ready=True)
        self.device_pool.release(full)

    patch.setattr(Residency, "adopt", adopt)


def admission_counts_only_windows_on_the_host(patch: Patch) -> None:
    original = PrefixCache.match

    def match(self: PrefixCache, pages: Any, namespace: Any, *rest: Any) -> PrefixMatch:
        found = original(self, pages, namespace, *rest)
        window = self.window_of(found.rows)
        missing = int(np.count_nonzero(~self.table.swa_device.present[window]))
        return found._replace(window_pages_to_pin=missing)

    patch.setattr(PrefixCache, "match", match)


def locks_before_the_copy_are_not_counted(patch: Patch) -> None:
    original = INTERPRETED.slots.put

    def put(*args: Any) -> None:
        counts, locked = args[4], int(args[4][1])
        original(*args)
        counts[1] = locked

    patch.setattr(INTERPRETED.slots, "put", put)


def a_hit_is_not_confirmed_by_tokens(patch: Patch) -> None:
    patch.setattr(PATHS, "difference", lambda c, row, pages, number: 0)


def loaded_pages_are_never_ready(patch: Patch) -> None:
    def commit(self: Loads, op: int) -> None:
        self._log.end(TransferKind.LOAD, op).hold.release()

    patch.setattr(Loads, "commit", commit)


def an_abandoned_backup_gives_its_host_slots_back_at_once(patch: Patch) -> None:
    original, commit = Backups.abandon, Backups.commit

    def abandon(self: Backups, transfer: Transfer) -> None:
        original(self, transfer)
        self._residency.host.give_back(transfer.full.host)

    def commit_without_them(self: Backups, op: int, *, ok: bool) -> None:
        transfer = self._log.pending[TransferKind.BACKUP][op]
        if transfer.abandoned:
            transfer.full = Copies(*(array[:0] for array in dataclasses.astuple(transfer.full)))
        commit(self, op, ok=ok)

    patch.setattr(Backups, "abandon", abandon)
    patch.setattr(Backups, "commit", commit_without_them)


def an_abandoned_backup_is_published(patch: Patch) -> None:
    original = Backups.commit

    def commit(self: Backups, op: int, *, ok: bool) -> None:
        transfer = self._log.pending[TransferKind.BACKUP][op]
        original(self, op, ok=ok)
        alive = self._table.device.ready[transfer.full.rows]
        if transfer.abandoned and ok and alive.all():
            slots, _ = self._residency.host.reserve(transfer.full.rows)
            self._table.host.put(transfer.full.rows, slots, ready=True)

    patch.setattr(Backups, "commit", commit)


def a_request_counts_once_for_each_of_its_chunks(patch: Patch) -> None:
    def count(c: Any, rows: Any, request: int, priority: int) -> bool:
        c.hits[rows] += 1
        return False

    patch.setattr(PATHS, "_count_request", count)


def selective_copies_at_the_first_request(patch: Patch) -> None:
    patch.setattr(
        backups_module, "pages_to_copy_now", lambda policy, hits: len(hits) if hits.any() else 0
    )


def copies_on_the_host_alone_go_first(patch: Patch) -> None:
    patch.setattr(HostRoom, "_drop_duplicates", lambda self, space, pages, younger_than: 0)
    patch.setattr(HostRoom, "_drop_duplicate_pages", lambda self, pages, younger_than, leaves: 0)


def duplicates_of_older_pages_go_too(patch: Patch) -> None:
    original = HostRoom._drop_duplicates
    patch.setattr(
        HostRoom,
        "_drop_duplicates",
        lambda self, space, pages, younger_than: original(self, space, pages, -(1 << 63)),
    )


def an_early_copy_takes_room_from_others(patch: Patch) -> None:
    original = Backups._reserve_on_host
    patch.setattr(
        Backups,
        "_reserve_on_host",
        lambda self, rows, full, stops, claim: original(
            self, rows, full, stops, claim or Claim.of(self._table, rows, full)
        ),
    )


def mix_in_the_local_report(patch: Patch, mix: Callable[[Any, Any], Any]) -> None:
    """Ranks apply ``mix`` of their own report and the agreed one."""
    reported: dict[int, list[int]] = {}
    report, commit = Ledger.report, Ledger.commit

    def remember(self: Ledger, backed_up: int, loaded: int) -> list[int]:
        reported[id(self)] = report(self, backed_up, loaded)
        return reported[id(self)]

    patch.setattr(Ledger, "report", remember)
    patch.setattr(
        Ledger, "commit", lambda self, agreed: commit(self, mix(reported[id(self)], agreed))
    )


def a_rank_commits_what_has_ended_here(patch: Patch) -> None:
    mix_in_the_local_report(patch, lambda local, agreed: [*local[:2], *agreed[2:]])


def a_failure_elsewhere_is_not_one_here(patch: Patch) -> None:
    mix_in_the_local_report(patch, lambda local, agreed: [*agreed[:2], *local[2:]])


def room_is_asked_from_the_pool(patch: Patch) -> None:
    patch.setattr(SimSlots, "room", lambda self, used: self.free_pages())


def placeholders_are_given_to_the_pool(patch: Patch) -> None:
    patch.setattr(HostSpace, "release", lambda self, slots: self._pool.release(slots))


def half_a_window_is_copied(patch: Patch) -> None:
    original = Backups._missing_windows
    patch.setattr(
        Backups,
        "_missing_windows",
        lambda self, rows, stops: (window[1:] for window in original(self, rows, stops)),
    )


def a_window_is_kept_before_it_is_whole(patch: Patch) -> None:
    def keep(self: Backups, path: Any, stops: tuple[int, ...], spare: Any = ()) -> None:
        for stop in stops:
            if not self._kept.ends[path[stop - 1]]:
                self._kept.add(path[:stop])

    patch.setattr(Backups, "_keep_windows", keep)


def a_window_takes_pages_along_that_others_need(patch: Patch) -> None:
    original = KeptWindows.remove

    def remove(self: KeptWindows, end: int) -> Any:
        window = self._table.path(end)[-self._window_pages :]
        original(self, end)
        return window

    def drop(self: Residency, rows: Any) -> int:
        rows = rows[self.table.swa_host.ready[rows] & (self.table.swa_host.locks[rows] == 0)]
        self.host_window.drop(rows)
        return len(rows)

    patch.setattr(KeptWindows, "remove", remove)
    patch.setattr(Residency, "drop_unneeded", drop)


def a_window_gives_up_pages_that_are_being_loaded(patch: Patch) -> None:
    def drop(self: Residency, rows: Any) -> int:
        unneeded = self.table.swa_host.ready[rows] & (self.kept.uses[rows] == 0)
        self.host_window.drop(rows[unneeded])
        return int(unneeded.sum())

    patch.setattr(Residency, "drop_unneeded", drop)
    patch.setattr(Residency, "are_in_use", lambda self, windows: np.zeros(len(windows), dtype=bool))


def pages_stay_that_lead_nowhere(patch: Patch) -> None:
    def drop(self: HostRoom, gone: list[Forgotten]) -> None:
        for tail in gone:
            self._host_window.drop(tail.windows)

    patch.setattr(HostRoom, "_drop", drop)


def a_prefix_gives_way_twice(patch: Patch) -> None:
    def take(self: Tails, heap: list[tuple[int, int]]) -> None:
        heapq.heappop(heap)
        self._entries -= 1

    patch.setattr(Tails, "_take_first", take)


def a_page_stays_behind_the_last_window(patch: Patch) -> None:
    original = Residency.forget_tail

    def forget(self: Residency, end: int) -> Forgotten:
        tail = original(self, end)
        return tail._replace(lost=tail.lost[1:])

    patch.setattr(Residency, "forget_tail", forget)


def a_younger_prefix_gives_way(patch: Patch) -> None:
    original = HostRoom.tails
    patch.setattr(
        HostRoom, "tails", lambda self, limit, *lists: original(self, float("inf"), *lists)
    )


def a_flush_forgets_what_is_in_flight(patch: Patch) -> None:
    def reset(self: Ledger) -> None:
        self._committed = dict.fromkeys(TransferKind, -1)
        self._failed = set()

    patch.setattr(Ledger, "reset", reset)


def a_moved_page_leaves_its_contents_behind(patch: Patch) -> None:
    patch.setattr(SimSharedMemory, "move", lambda self, component, source, target: None)


def a_page_lies_in_two_extents(patch: Patch) -> None:
    def numbers(self: ArenaShape, component: int) -> Any:
        page, extent = self.page_bytes[component][0], self.extent_bytes[0]
        start = np.arange(self.extents, dtype=np.int64) * extent
        return start // page, (start + extent) // page

    patch.setattr(ArenaShape, "page_numbers", numbers)


def a_flush_leaves_extents_behind(patch: Patch) -> None:
    clear = Arena.clear
    patch.setattr(Arena, "clear", lambda self: hasattr(self, "_taken") or clear(self))


def a_page_of_its_own_is_never_written(patch: Patch) -> None:
    patch.setattr(SimDevicePool, "copy", lambda self, *slots: None)


def a_tail_is_taken_from_those_who_hold_it(patch: Patch) -> None:
    def left(self: Inserts, row: int, used: int) -> bool:
        end = used * self._geometry.device_page
        return bool(self._table.tokens[row, end] == PAD)

    patch.setattr(Inserts, "_is_left_to_one", left)


def a_match_inside_a_page_goes_too_far(patch: Patch) -> None:
    original = PATHS.inside_of

    def inside(c: Any, *args: Any) -> tuple[int, int]:
        row, shared = original(c, *args)
        step = c.device_page
        return row, min(shared + step, c.weights.size - step) if shared else 0

    patch.setattr(PATHS, "inside_of", inside)
    patch.setattr(INTERPRETED.siblings, "inside_of", inside)


def a_window_does_not_reach_behind_who_resumes_inside(patch: Patch) -> None:
    patch.setattr(Geometry, "window_pages", property(lambda g: -(-g.window // g.page_tokens)))


def run_all_seeds(*loops: Loops) -> None:
    """The traffic that a correct index survives, see test_simulation."""
    for seed in dict.fromkeys((*FIRST, *range(SEEDS))):
        Simulation(seed, ranks=1 + seed % 2, modelled=seed % 3 == 0, loops=loops).run(STEPS)


BUGS: list[Callable[[Patch], None]] = [
    window_one_page_short,
    match_ignores_windows,
    lock_covers_one_page_less_of_the_window,
    ages_forget_the_depth,
    victims_are_known_by_ages_from_before,
    who_is_used_keeps_its_place,
    locks_are_not_told,
    kept_windows_are_not_told,
    a_tail_that_stays_is_not_put_back,
    a_priority_takes_32_bits,
    descendants_of_a_lost_page_stay,
    windows_outlive_their_page,
    host_evicts_what_is_being_loaded,
    backup_does_not_hold_its_path,
    a_failed_backup_is_published,
    duplicates_are_not_given_back,
    revived_window_replaces_a_live_one,
    admission_counts_only_windows_on_the_host,
    locks_before_the_copy_are_not_counted,
    a_hit_is_not_confirmed_by_tokens,
    loaded_pages_are_never_ready,
    an_abandoned_backup_gives_its_host_slots_back_at_once,
    a_page_of_its_own_is_never_written,
    a_tail_is_taken_from_those_who_hold_it,
    a_match_inside_a_page_goes_too_far,
    a_window_does_not_reach_behind_who_resumes_inside,
    an_abandoned_backup_is_published,
    a_request_counts_once_for_each_of_its_chunks,
    selective_copies_at_the_first_request,
    copies_on_the_host_alone_go_first,
    duplicates_of_older_pages_go_too,
    an_early_copy_takes_room_from_others,
    a_rank_commits_what_has_ended_here,
    a_failure_elsewhere_is_not_one_here,
    room_is_asked_from_the_pool,
    placeholders_are_given_to_the_pool,
    half_a_window_is_copied,
    a_window_is_kept_before_it_is_whole,
    a_window_takes_pages_along_that_others_need,
    a_window_gives_up_pages_that_are_being_loaded,
    pages_stay_that_lead_nowhere,
    a_prefix_gives_way_twice,
    a_page_stays_behind_the_last_window,
    a_younger_prefix_gives_way,
    a_flush_forgets_what_is_in_flight,
    a_moved_page_leaves_its_contents_behind,
    a_page_lies_in_two_extents,
    a_flush_leaves_extents_behind,
]


@pytest.mark.parametrize("seed_bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds_the_bug(
    seed_bug: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is compiled calls what it was compiled with: a bug in a loop reaches no other
    seed_bug(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        run_all_seeds(INTERPRETED)
