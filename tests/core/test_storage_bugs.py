"""The test of the tests for storage: each bug seeded here must be found by the traffic."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sglang_ext.core.host.space import HostSpace
from sglang_ext.core.storage import prefetches as prefetches_module
from sglang_ext.core.storage.ledger import StorageLedger
from sglang_ext.core.storage.persists import Persists
from sglang_ext.core.storage.plan import Prefetch, Stage
from sglang_ext.core.storage.prefetches import Prefetches
from sglang_ext.core.table.columns import SlotColumn
from sglang_ext.core.table.table import STORED, PageTable
from sglang_ext.testing.simulation import Simulation

Patch = pytest.MonkeyPatch
SEEDS, STEPS = 360, 800
FIRST = (7, 3, 44, 281, 20, 5)
"""Seeds that find what few others do; they come first."""


def storage_reads_slots_that_are_free(patch: Patch) -> None:
    patch.setattr(HostSpace, "pin", lambda self, slots: None)
    patch.setattr(HostSpace, "unpin", lambda self, slots: None)


def a_pinned_slot_is_lost_when_its_page_goes(patch: Patch) -> None:
    def unpin(self: HostSpace, slots: Any) -> None:
        for slot in slots[:, 0].tolist():
            self.detached -= self._pinned.pop(slot)

    patch.setattr(HostSpace, "unpin", unpin)


def rows_that_leave_keep_their_locks(patch: Patch) -> None:
    patch.setattr(SlotColumn, "break_locks", lambda self, rows: None)


def a_persist_unlocks_whatever_has_its_rows_now(patch: Patch) -> None:
    patch.setattr(Persists, "_still_there", lambda self, held: held.rows)


def keys_do_not_depend_on_the_prefix(patch: Patch) -> None:
    original = prefetches_module.chain
    patch.setattr(prefetches_module, "chain", lambda before, pages, n: original(b"", pages, n))


def a_namespace_is_not_in_the_key(patch: Patch) -> None:
    patch.setattr("sglang_ext.core.storage.attachment.namespace_seed", lambda namespace: b"")


def keys_outlive_their_row(patch: Patch) -> None:
    original = PageTable.add_rows

    def add(self: PageTable, above: Any, pages: Any, namespace: Any) -> Any:
        keyed = self.keyed.copy()
        rows = original(self, above, pages, namespace)
        self.keyed[rows] = keyed[rows]
        return rows

    patch.setattr(PageTable, "add_rows", add)


def a_stage_is_published_before_it_is_read_everywhere(patch: Patch) -> None:
    original = StorageLedger.commit

    def commit(self: StorageLedger, agreed: Sequence[int]) -> Any:
        for op, stages in list(self._read.items()):
            if op in self._index.prefetches.reading:
                self._index.prefetches.publish(op, stages)
        return original(self, agreed)

    patch.setattr(StorageLedger, "commit", commit)


def a_page_that_could_not_be_read_is_published(patch: Patch) -> None:
    original = StorageLedger.over

    def over(self: StorageLedger, op: int) -> None:
        plan = self._index.prefetches.reading[op]
        self.read(op, len(plan.stages))
        original(self, op)

    patch.setattr(StorageLedger, "over", over)


def slots_are_free_while_a_cancelled_prefetch_is_read(patch: Patch) -> None:
    original = Prefetches.cancel

    def cancel(self: Prefetches, op: int) -> None:
        original(self, op)
        plan = self.reading.get(op)
        if plan is not None:
            for stage in plan.stages[plan.published :]:
                self._host.give_back(stage.full.slots)
                self._host_window.give_back(stage.window.slots)
            plan.published = len(plan.stages)

    patch.setattr(Prefetches, "cancel", cancel)


def ranks_take_their_own_resume_point(patch: Patch) -> None:
    def decide(self: StorageLedger, prefetch: Prefetch, answer: Sequence[int]) -> Any:
        found = self._found.pop(prefetch.op, None)
        if found is None and not prefetch.cancelled:
            return None
        stop = self._index.prefetches.candidate(prefetch, found or [], prefetch.limit)
        return self._index.prefetches.begin(prefetch.op, (stop,) if stop else ())

    patch.setattr(StorageLedger, "_decide", decide)


def a_prefetch_goes_on_where_its_prefix_is_gone(patch: Patch) -> None:
    original = Prefetches._publish

    def publish(self: Prefetches, prefetch: Prefetch) -> bool:
        ok = original(self, prefetch)
        if not ok:
            stage: Stage = prefetch.stages[prefetch.published]
            self._host.attach(len(stage.full))
            self._host_window.attach(len(stage.window))
        return ok or True

    patch.setattr(Prefetches, "_publish", publish)


def half_a_window_is_kept(patch: Patch) -> None:
    def window(self: Prefetches, path: Any, stage: Stage) -> None:
        count = len(stage.window) - 1
        self._host_window.attach(len(stage.window))
        self._host_window.release(stage.window.slots[count:])
        rows = path[len(path) - len(stage.window) :][:count]
        there = self._table.swa_host.present[rows]
        self._host_window.release(stage.window.slots[:count][there])
        self._table.swa_host.put(rows[~there], stage.window.slots[:count][~there], ready=True)

    patch.setattr(Prefetches, "_publish_window", window)


def what_is_there_already_is_not_given_back(patch: Patch) -> None:
    original = Prefetches._publish

    def publish(self: Prefetches, prefetch: Prefetch) -> bool:
        release = self._host.release
        self._host.release = lambda slots: None  # type: ignore[method-assign]
        try:
            return original(self, prefetch)
        finally:
            self._host.release = release  # type: ignore[method-assign]

    patch.setattr(Prefetches, "_publish", publish)


def early_copies_recycle_what_storage_has_not(patch: Patch) -> None:
    """Found by the check that a page on the host alone has all pages in front of it."""
    from sglang_ext.core.host.room import HostRoom

    def recycle(self: HostRoom, space: HostSpace, pages: int) -> None:
        rows = np.flatnonzero(space.column.ready)[:pages]
        space.drop(rows)

    patch.setattr(HostRoom, "_recycle", recycle)


def a_persist_that_failed_counts(patch: Patch) -> None:
    original = Persists.commit

    def commit(self: Persists, op: int, pages: int, now_ms: int) -> None:
        plan = self.writing[op]
        original(self, op, len(plan.full) + len(plan.window), now_ms)

    patch.setattr(Persists, "commit", commit)


def nobody_ends_a_prefetch(patch: Patch) -> None:
    patch.setattr(StorageLedger, "over", lambda self, op: None)


def a_flush_forgets_what_storage_does(patch: Patch) -> None:
    from sglang_ext.testing.storage import SimStorage

    patch.setattr(SimStorage, "drain", lambda self, ledger: None)


def run_all_seeds() -> None:
    """The traffic that a correct index survives."""
    for seed in dict.fromkeys((*FIRST, *range(SEEDS))):
        Simulation(seed, ranks=1 + seed % 3, storage=True).run(STEPS)


def test_storage_with_faults_is_never_wrong_and_nobody_waits_for_ever(
    full: bool,
) -> None:
    """Rare transitions are reached, too."""
    reached: set[str] = set()
    for seed in range(60 if full else 20):
        simulation = Simulation(seed, ranks=1 + seed % 3, storage=True)
        simulation.run(600)
        reached |= simulation.engine.seen
        counters = simulation.engine.index.counters.as_dict()
        reached |= {name for name, count in counters.items() if count}
    wanted = {
        *("persist", "prefetch", "prefetch cancelled while it reads", "storage hangs"),
        *("storage forgets", "storage is full", "persist after a page that is gone"),
        *("a page that was found cannot be read", "flush in flight"),
        *("prefetched_pages", "prefetched_window_pages", "lost_prefetched_pages"),
        *("unpersisted_pages", "declined_storage_backlog", "declined_stale"),
    }
    assert wanted <= reached, f"never reached: {wanted - reached}"


def what_storage_has_lost_still_counts(patch: Patch) -> None:
    def forget_stored(self: Persists) -> None:
        for state in (self._table.stored, self._table.window_stored):
            state[state == STORED] = 0

    patch.setattr(Persists, "forget_stored", forget_stored)


BUGS: list[Callable[[Patch], None]] = [
    what_storage_has_lost_still_counts,
    storage_reads_slots_that_are_free,
    a_pinned_slot_is_lost_when_its_page_goes,
    rows_that_leave_keep_their_locks,
    a_persist_unlocks_whatever_has_its_rows_now,
    keys_do_not_depend_on_the_prefix,
    a_namespace_is_not_in_the_key,
    keys_outlive_their_row,
    a_stage_is_published_before_it_is_read_everywhere,
    a_page_that_could_not_be_read_is_published,
    slots_are_free_while_a_cancelled_prefetch_is_read,
    ranks_take_their_own_resume_point,
    a_prefetch_goes_on_where_its_prefix_is_gone,
    half_a_window_is_kept,
    what_is_there_already_is_not_given_back,
    early_copies_recycle_what_storage_has_not,
    a_persist_that_failed_counts,
    nobody_ends_a_prefetch,
    a_flush_forgets_what_storage_does,
]


@pytest.mark.parametrize("seed_bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_simulation_finds_the_bug(
    seed_bug: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_bug(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        run_all_seeds()
