"""Device pages smaller than the table's: requests that resume and end inside a table page.

What a request leaves behind its last whole page is kept as a *tail*: a page whose tokens are
filled up with PAD, and whose slots are filled up with slots that nobody reads. For everything
else it is an ordinary page. A page never changes, so a request that resumed inside one gets
slots of its own for what it reads there before it puts its own page into the table.
"""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from sglang_ext.core.columns import ABSENT, Rows, Slots
from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.paths import Page
from sglang_ext.core.plan import Hold
from sglang_ext.core.prefetches import Prefetches


class Tail(NamedTuple):
    """What a request has behind its last whole page.

    Attributes:
        tokens: (page_tokens,) from some token on PAD.
        full, swa: (n,) its device slots, and their sliding-window peers.
    """

    tokens: Page
    full: Slots
    swa: Slots


class Own(NamedTuple):
    """What a request has of a page that it resumed inside, from now on.

    Attributes:
        full, swa: (n,) device slots, and their sliding-window peers.
        hold: locks the path without that page.
    """

    full: Slots
    swa: Slots
    hold: Hold


class Tails(Prefetches):
    """The part of the index for what ends inside a page."""

    def own(self, path: Rows, used: int, hold: Hold) -> Own | None:
        """Give a request slots of its own for the first ``used`` device pages of the last page
        of a path, inside which it resumed.

        Args:
            hold: its lock on the path; released.

        Returns:
            None without room; nothing has changed then.
        """
        table, last = self.table, path[-1:]
        full, swa = table.device.slots[path[-1], :used], table.swa_device.slots[path[-1], :used]
        if self._is_left_to_one(int(path[-1]), used):
            full, swa = full.copy(), swa.copy()
            above = self.hold(path[:-1])
            hold.release()
            self._take_tail(last, used)
            return Own(full, swa, above)
        slots = self._bound_slots(used)
        if slots is None:
            return None
        self.device_pool.copy(full, swa, *slots)
        self.counters.copied_inside += 1
        above = self.hold(path[:-1])
        hold.release()
        return Own(*slots, above)

    def _is_left_to_one(self, row: int, used: int) -> bool:
        """Whether nobody but one request holds a tail, all of which that one uses."""
        table = self.table
        if table.tokens[row, used * self.geometry.device_page] != PAD:
            return False
        columns = (table.device, table.swa_device, table.host, table.swa_host)
        return [int(column.locks[row]) for column in columns] == [1, 1, 0, 0]

    def _take_tail(self, last: Rows, used: int) -> None:
        """Forget a tail whose first slots a request goes on with."""
        table = self.table
        full, swa = table.device.take(last)[0, used:], table.swa_device.take(last)[0, used:]
        self.device_pool.release_window(full, swa)
        self.device_pool.release(full)
        if self.host_tier is not None:
            self._forget_windows(last[self.checkpoints.ends[last]])
            self.host.drop(last[table.host.present[last]])
        table.remove_rows(last)

    def _bound_slots(self, count: int) -> tuple[Slots, Slots] | None:
        """Device slots, less than a page of them, and their sliding-window peers."""
        pool = self.device_pool
        self.evict_device(max(0, 1 - pool.free_pages()), max(0, 1 - pool.free_window_pages()))
        if min(pool.free_pages(), pool.free_window_pages()) < 1:
            return None
        return pool.allocate_bound(count)

    def _padding(self, tail: Tail | None) -> tuple[Slots, Slots] | None:
        """Slots that make a page of a tail; None if there is no tail, or no room for one."""
        if tail is None or len(tail.full) == 0:
            return None
        return self._bound_slots(self.geometry.slots_per_page - len(tail.full))

    def _with_tail(
        self,
        path: Rows,
        pages: int,
        namespace: Hashable,
        tail: Tail,
        padding: tuple[Slots, Slots],
    ) -> Rows:
        """A path and a row for its tail; without one if there is a page that begins as it, or
        if the path has not all the pages in front of it."""
        table, pool = self.table, self.device_pool
        full = np.concatenate((tail.full, padding[0]))[None]
        swa = np.concatenate((tail.swa, padding[1]))[None]
        row = table.exact(path, tail.tokens, namespace) if len(path) == pages else None
        rows = np.array([] if row is None else [row], dtype=np.int64)
        if row is not None:
            self._adopt(rows, full, swa)
        elif len(path) == pages and not self._begins_a_page(path, namespace, tail):
            rows = table.add_rows(path, tail.tokens[None], namespace)
            self._give_device(rows, full[: len(rows)], swa[: len(rows)])
        if len(rows) == 0:
            pool.release_window(*padding)
            pool.release(padding[0])
        return np.concatenate((path, rows))

    def _begins_a_page(self, path: Rows, namespace: Hashable, tail: Tail) -> bool:
        """Whether a page on the device begins with all of a tail."""
        root = self.table.root(namespace)
        if root is None:
            return False
        parent = int(path[-1]) if len(path) else root
        row, shared = self.table.inside(parent, tail.tokens)
        whole = shared == len(tail.full) * self.geometry.device_page
        return whole and bool(self.table.swa_device.present[row])

    # ---- slots of a request go to the table ----------------------------------

    def _adopt(self, rows: Rows, full: Slots, swa: Slots) -> None:
        """Merge a request's slots into rows that exist."""
        table = self.table
        missing = ~table.device.present[rows]
        if missing.any():
            self._give_device(rows[missing], full[missing], swa[missing])
            rows, full, swa = rows[~missing], full[~missing], swa[~missing]
        if len(rows) == 0:
            return
        # The rows keep their own full-attention slots: other requests may use
        # them. Only a missing sliding-window peer is taken from the request.
        live = swa[:, 0] != ABSENT
        revived = live & ~table.swa_device.present[rows]
        if revived.any():
            where = rows[revived]
            self.device_pool.move_window(full[revived], table.device.slots[where], swa[revived])
            table.swa_device.put(where, swa[revived], ready=True)
            live &= ~revived
        if live.all():
            self.device_pool.release_window(full, swa)
        elif live.any():
            self.device_pool.release_window(full[live], swa[live])
        self.device_pool.release(full)

    def _give_device(self, rows: Rows, full: Slots, swa: Slots) -> None:
        table = self.table
        table.device.put(rows, full, ready=True)
        table.swa_device.put_live(rows, swa)
