"""What requests have computed goes to the table.

Where device pages are smaller than the table's, requests resume and end inside a table page.
What a request leaves behind its last whole page is kept as a *tail*: a page whose tokens are
filled up with PAD, and whose slots are filled up with slots that nobody reads. For everything
else it is an ordinary page. A page never changes, so a request that resumed inside one gets
slots of its own for what it reads there before it puts its own page into the table.
"""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.device.eviction import DeviceEviction
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.plan import Hold
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import Page


class Tail(NamedTuple):
    """What a request has behind its last whole page.

    Attributes:
        tokens: (name_tokens,) from some token on PAD.
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


class Inserts:
    """Takes over what requests computed.

    Args:
        interval: pages between windows inside a prompt, see ``windows.resume_points``.
    """

    def __init__(
        self,
        residency: Residency,
        eviction: DeviceEviction,
        ahead: LookAhead,
        interval: int,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._pool = residency.device_pool
        self._kept = residency.kept
        self._counters = residency.counters
        self._geometry = residency.table.geometry
        self._eviction = eviction
        self._ahead = ahead
        self._interval = interval

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
        """Take over what a request computed and return the path of its prefix.

        Args:
            pages: (n, name_tokens) names of the request's whole prefix.
            namespace: what separates this prefix from equal tokens elsewhere.
            first_owned: pages ``[0, first_owned)`` already belong to the table, and
                the request holds a lock on them.
            full: device slots of pages ``[first_owned, n)``.
            swa: their sliding-window peers, ABSENT where the window has moved on.
            request: identifies the request among those of the last time.
            priority: of the request, for eviction by priority.
            tail: what the request has behind those pages.

        Returns:
            The rows of pages ``[0, k)``. k is n except after a digest collision;
            slots of pages ``[k, n)`` stay with the request. Behind them comes the row of
            the tail, if the table has taken it. Slots of pages that the table already has
            on the device are given back here; the request must use the table's slots
            from now on.
        """
        table = self._table
        # what makes room for it might take what is in the table and not locked yet
        padding = self.padding(tail)
        known = table.lookup(pages, namespace)
        assert len(known) >= first_owned, "a locked prefix left the table"
        table.advance()
        shared = known[first_owned:]
        if len(shared):
            self._residency.adopt(shared, full[: len(shared)], swa[: len(shared)])
        rows = known
        if len(known) < len(pages):
            added = table.add_rows(known, pages[len(known) :], namespace)
            start = len(shared)
            stop = start + len(added)
            if stop < len(full):
                self._counters.collisions += 1
            self._residency.give(added, full[start:stop], swa[start:stop])
            rows = np.concatenate((known, added)) if len(known) else added
        if tail is not None and padding is not None:
            rows = self._with_tail(rows, len(pages), namespace, tail, padding)
        if len(rows):
            table.record(rows, request, priority, self._interval)
            self._residency.used(rows)
        return rows

    def count_request(self, rows: Rows, request: int, priority: int = 0) -> bool:
        """A request that adds nothing to a path has used it all the same.

        Args:
            rows: the path, which it holds.
            request, priority: as for ``insert``.

        Returns:
            Whether it was not counted yet: then the path may be worth a copy now.
        """
        if len(rows) == 0 or not self._table.count_request(rows, request, priority):
            return False
        self._residency.use(rows)
        return True

    def note_prompt_end(self, rows: Rows, pages: int) -> None:
        """The same prompt again resumes after so many pages of a path.

        One token must be left to compute, so a prompt that ends on a page boundary resumes a
        page before it: that window is worth as much as the one at the end. When the answer has
        gone on from there, it is kept only where there is room: conversations go on more often
        than prompts are repeated.

        Args:
            rows: the path, as long as what was just inserted.
            pages: whole ones that all tokens of the prompt but the last one name.
        """
        table = self._table
        window = self._residency.window_of(rows[:pages])
        if (
            len(window) == 0
            or not (table.swa_device.present[window] | table.swa_host.ready[window]).all()
        ):
            return
        table.resume_if_room[window[-1]] = True
        if len(rows) - pages <= 1:
            table.resume[window[-1]] = True
            table.use_window(window)
        self._residency.used(window)

    # ---- inside a page ----------------------------------------------------------

    def own(self, path: Rows, used: int, hold: Hold) -> Own | None:
        """Give a request slots of its own for the first ``used`` device pages of the last page
        of a path, inside which it resumed.

        Args:
            hold: its lock on the path; released.

        Returns:
            None without room; nothing has changed then.
        """
        table, last = self._table, path[-1:]
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
        self._pool.copy(full, swa, *slots)
        self._counters.copied_inside += 1
        above = self.hold(path[:-1])
        hold.release()
        return Own(*slots, above)

    def hold(self, rows: Rows) -> Hold:
        """See ``Residency.hold``; for a request, which takes pages from what can be evicted."""
        self._ahead.note_held(len(rows))
        return self._residency.hold(rows)

    def _is_left_to_one(self, row: int, used: int) -> bool:
        """Whether nobody but one request holds a tail, all of which that one uses."""
        table = self._table
        end = used * self._geometry.device_page + self._geometry.overlap
        if table.tokens[row, end] != PAD:
            return False
        columns = (table.device, table.swa_device, table.host, table.swa_host)
        return [int(column.locks[row]) for column in columns] == [1, 1, 0, 0]

    def _take_tail(self, last: Rows, used: int) -> None:
        """Forget a tail whose first slots a request goes on with."""
        table = self._table
        full, swa = table.device.take(last)[0, used:], table.swa_device.take(last)[0, used:]
        self._pool.release_window(full, swa)
        self._pool.release(full)
        if self._residency.tier is not None:
            self._residency.forget_windows(last[self._kept.ends[last]])
            self._residency.host.drop(last[table.host.present[last]])
        table.remove_rows(last)
        self._residency.candidates.note(last)

    def _bound_slots(self, count: int) -> tuple[Slots, Slots] | None:
        """Device slots, less than a page of them, and their sliding-window peers."""
        pool = self._pool
        self._eviction.evict(max(0, 1 - pool.free_pages()), max(0, 1 - pool.free_window_pages()))
        if min(pool.free_pages(), pool.free_window_pages()) < 1:
            return None
        return pool.allocate_bound(count)

    def padding(self, tail: Tail | None) -> tuple[Slots, Slots] | None:
        """Slots that make a page of a tail; None if there is no tail, or no room for one."""
        if tail is None or len(tail.full) == 0:
            return None
        return self._bound_slots(self._geometry.slots_per_page - len(tail.full))

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
        table, pool = self._table, self._pool
        full = np.concatenate((tail.full, padding[0]))[None]
        swa = np.concatenate((tail.swa, padding[1]))[None]
        row = table.exact(path, tail.tokens, namespace) if len(path) == pages else None
        rows = np.array([] if row is None else [row], dtype=np.int64)
        if row is not None:
            self._residency.adopt(rows, full, swa)
        elif len(path) == pages and not self._begins_a_page(path, namespace, tail):
            rows = table.add_rows(path, tail.tokens[None], namespace)
            self._residency.give(rows, full[: len(rows)], swa[: len(rows)])
        if len(rows) == 0:
            pool.release_window(*padding)
            pool.release(padding[0])
        return np.concatenate((path, rows))

    def _begins_a_page(self, path: Rows, namespace: Hashable, tail: Tail) -> bool:
        """Whether a page on the device begins with all of a tail."""
        root = self._table.root(namespace)
        if root is None:
            return False
        parent = int(path[-1]) if len(path) else root
        row, shared = self._table.inside(parent, tail.tokens)
        whole = shared == len(tail.full) * self._geometry.device_page
        return whole and bool(self._table.swa_device.present[row])
