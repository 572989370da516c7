"""What storage may change of what the model knows."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.storage.plan import Prefetch
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.table import STORED
from sglang_ext.testing.model_page import ABSENT, READY, Key, States, prefix_keys
from sglang_ext.testing.watch import around, require

if TYPE_CHECKING:
    from sglang_ext.testing.model import ModelledIndex


class StorageRules:
    """Watches prefetches and persists of an index.

    Args:
        index: whatever is watched of it, is so already.
    """

    def __init__(self, index: "ModelledIndex") -> None:
        self._index = index
        around(index.prefetches, "begin", self._watch_begin)
        around(index.prefetches, "_publish", self._watch_publish)
        around(index.persists, "begin", self._watch_persist)
        around(index.persists, "commit", self._watch_commit)

    def stored_copies(self, rows: Rows, given: Rows | None) -> Rows:
        """What a backup copies of a path: storage has a page only behind those in front of it.

        Args:
            given: pages that it is asked for; None for all.
        """
        table = self._index.table
        if given is None or len(given) == 0 or not self._index.attachment.is_there:
            return rows if given is None else given
        above = rows[: int(table.depth[given].max())]
        return np.union1d(given, above[table.device.ready[above] & (table.stored[above] == 0)])

    def may_be_recycled(self, states: States) -> set[Key]:
        """Host copies that early ones may take: of what is on the device, in storage, and not in
        front of something that is on the host alone."""
        index, needed = self._index, set[Key | None]()
        if not index.attachment.is_there:
            return set()
        for key, state in states.items():
            parent = None if state[0] else index.pages[key].parent
            while parent is not None and parent not in needed:
                needed.add(parent)
                parent = index.pages[parent].parent
        rows = np.flatnonzero((index.table.stored == STORED) & (index.table.parent != FREE))
        stored = {index.key(row) for row in rows.tolist()}
        ready = {key for key, state in states.items() if state[0] == READY == state[1]}
        return (ready & stored) - needed

    def _watch_begin(
        self, begin: Callable[..., Prefetch | None], op: int, stops: tuple[int, ...]
    ) -> Prefetch | None:
        """What gives way is on the host, and nothing that it continues."""
        index, table = self._index, self._index.table
        prefetch = index.prefetches.lookups[op]
        path = table.lookup(prefetch.pages, prefetch.namespace)
        kept = index.kept.ends[path]
        keys = [index.key(row) for row in path.tolist()]
        before = index.states()
        plan = begin(op, stops)
        after = index.states()
        require(after.keys() <= before.keys(), "a prefetch brought a page before it was read")
        for key, state in after.items():
            device, host, swa_device, swa_host = before[key]
            require((state[0], state[2]) == (device, swa_device), "room changed the device")
            require(state[1] in (host, ABSENT), "a copy appeared")
            require(state[3] in (swa_host, ABSENT), "a window appeared")
        for key in keys:
            require(key in after, "a prefetch took a page that it continues")
            require(after[key][1] == before[key][1], "a prefetch took a copy that it continues")
        require(bool((index.kept.ends[path] == kept).all()), "a window that it continues went")
        index.accept(after)
        return plan

    def _watch_publish(self, publish: Callable[[Prefetch], bool], prefetch: Prefetch) -> bool:
        """What was read is on the host, whole up to a resume point, or nothing has changed."""
        index, expected = self._index, self._index.states()
        stage, stop = prefetch.stages[prefetch.published], prefetch.stops[prefetch.published]
        keys = list(prefix_keys(prefetch.pages[:stop], prefetch.namespace))
        known = sum(key in expected for key in keys)
        window = keys[stop - len(stage.window) :]
        before = keys[max(0, stop - index.geometry.window_pages) : stop - len(stage.window)]
        fits = known >= stop - len(stage.full)
        fits &= all(expected.get(key, (0,) * 4)[3] == READY for key in before)
        fits &= all(expected.get(key, (0,) * 4)[3] in (ABSENT, READY) for key in window)
        done = publish(prefetch)
        require(done == fits, f"a prefetch is published: {done}, expected {fits}")
        if not done:
            index.expect(expected, "a prefetch that is not published")
            return False
        if 0 < known < stop:
            index.count_fork(keys[known - 1])
        for depth in range(known, stop):
            parent = None if depth == 0 else keys[depth - 1]
            index.pages[keys[depth]] = index.new_page(depth, parent, ticks=0)
            expected[keys[depth]] = (ABSENT, READY, ABSENT, ABSENT)
        for key in window:
            expected[key] = (*expected[key][:3], READY)
        rows = index.table.lookup(prefetch.pages[:stop], prefetch.namespace)
        require([index.key(row) for row in rows.tolist()] == keys, "another path was published")
        require(bool(index.kept.ends[rows[-1]]), "nobody keeps a window that was read")
        index.note_use(rows)
        index.expect(expected, "a prefetch")
        index.check_ages()
        return True

    def _watch_persist(self, begin: Callable[[int], Any], now_ms: int) -> Any:
        """Storage reads: nothing changes."""
        before = self._index.states()
        begun = begin(now_ms)
        self._index.expect(before, "begin of a persist")
        return begun

    def _watch_commit(self, commit: Callable[..., None], op: int, pages: int, now_ms: int) -> None:
        """Nothing goes but window pages that nobody needs any more."""
        index, held = self._index, self._index.persists.writing[op].window_rows
        rows = held.rows[index.table.generation[held.rows] == held.generations]
        expected = index.states()
        commit(op, pages, now_ms)
        index.allow_half_windows_to_go(rows, expected)
        index.expect(expected, "commit of a persist")
