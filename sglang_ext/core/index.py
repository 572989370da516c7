"""The cache index: match and insert, on top of eviction, backups, loads and storage.

A transfer is *begun* (slots reserved, rows held), executed elsewhere, and
*committed*; nothing is published before its commit. The index decides and
accounts, it never copies a byte.
"""

from collections.abc import Hashable

import numpy as np

from sglang_ext.core.columns import Rows, Slots
from sglang_ext.core.digest import Pages
from sglang_ext.core.paths import Page
from sglang_ext.core.plan import PrefixMatch
from sglang_ext.core.tails import Tail, Tails


class CacheIndex(Tails):
    """The table, its victims and its transfers behind one facade."""

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """Best resume point for a prompt of ``pages`` (n, page_tokens), and of ``rest`` behind
        them, see ``PathTable.match``. Read-only."""
        return self.table.match(pages, namespace, rest)

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """The same for a request, which uses what is found."""
        match = self.table.match_and_use(pages, namespace, rest)
        self._used(match.rows)
        return match

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
            pages: (n, page_tokens) tokens of the request's whole prefix.
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
        table = self.table
        # what makes room for it might take what is in the table and not locked yet
        padding = self._padding(tail)
        known = table.lookup(pages, namespace)
        assert len(known) >= first_owned, "a locked prefix left the table"
        table.advance()
        shared = known[first_owned:]
        if len(shared):
            self._adopt(shared, full[: len(shared)], swa[: len(shared)])
        rows = known
        if len(known) < len(pages):
            added = table.add_rows(known, pages[len(known) :], namespace)
            start = len(shared)
            stop = start + len(added)
            if stop < len(full):
                self.counters.collisions += 1
            self._give_device(added, full[start:stop], swa[start:stop])
            rows = np.concatenate((known, added)) if len(known) else added
        if tail is not None and padding is not None:
            rows = self._with_tail(rows, len(pages), namespace, tail, padding)
        if len(rows):
            table.record(rows, request, priority, self.policy.checkpoint_pages)
        return rows

    def count_request(self, rows: Rows, request: int, priority: int = 0) -> bool:
        """A request that adds nothing to a path has used it all the same.

        Args:
            rows: the path, which it holds.
            request, priority: as for ``insert``.

        Returns:
            Whether it was not counted yet: then the path may be worth a copy now.
        """
        if len(rows) == 0 or not self.table.count_request(rows, request, priority):
            return False
        self.use(rows)
        return True

    def note_prompt_end(self, rows: Rows, pages: int) -> None:
        """The same prompt again resumes after so many pages of a path.

        One token must be left to compute, so a prompt that ends on a page boundary resumes a
        page before it: that window is worth as much as the one at the end. When the answer has
        gone on from there, it is kept only where there is room: conversations go on more often
        than prompts are repeated.

        Args:
            rows: the path, as long as what was just inserted.
            pages: ``(tokens of the prompt - 1) // page_tokens``.
        """
        table = self.table
        window = self.window_of(rows[:pages])
        if (
            len(window) == 0
            or not (table.swa_device.present[window] | table.swa_host.ready[window]).all()
        ):
            return
        table.resume_if_room[window[-1]] = True
        if len(rows) - pages <= 1:
            table.resume[window[-1]] = True
            table.touch_window(window)
