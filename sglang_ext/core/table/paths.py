"""What the table knows of a path: where a request can resume, what it is worth keeping for."""

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import LEFT_THE_PATH, PAD
from sglang_ext.core.plan import PrefixMatch
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.table import PageTable
from sglang_ext.core.table.window import complete_windows, deepest_resume, resume_points

Page = NDArray[np.int64]


def filled_up(tokens: Page, length: int) -> Page:
    """(length,) tokens, and PAD behind them."""
    page = np.full(length, PAD, dtype=np.int64)
    page[: len(tokens)] = tokens
    return page


class PathTable(PageTable):
    """The page table and statements about its paths."""

    def match(self, pages: Pages, namespace: Hashable, rest: Page | None = None) -> PrefixMatch:
        """Best resume point for a prompt of ``pages`` (n, page_tokens). Read-only.

        Args:
            rest: (n,) tokens that follow the pages, less than a page of them; None for a request
                that must not resume inside a page.
        """
        size = self.geometry.window_pages
        rows = self.lookup(pages, namespace)
        known, cut = len(rows), 0
        root = self.root(namespace)
        if rest is not None and root is not None:
            whole = known < len(pages)
            page = pages[known] if whole else filled_up(rest, self.geometry.page_tokens)
            last, shared = self.inside(int(rows[-1]) if known else root, page)
            if last >= 0:
                rows, cut = np.append(rows, last), len(page) - shared
        on_device = self.device.present[rows]
        device_pages = len(rows) if on_device.all() else int(on_device.argmin())
        swa_on_device = self.swa_device.present[rows]
        best = deepest_resume(swa_on_device | self.swa_host.ready[rows], size)
        ready = deepest_resume(swa_on_device[:device_pages], size)
        if ready >= best:
            cut = cut if ready > known else 0
            return PrefixMatch(rows[:ready], ready, 0, max(0, known - ready), cut)
        window = rows[max(0, best - size) : best]
        pinned = self.swa_device.present[window] & (self.swa_device.locks[window] > 0)
        to_pin = len(window) - int(np.count_nonzero(pinned))
        cut = cut if best > known else 0
        return PrefixMatch(rows[:best], ready, to_pin, max(0, known - best), cut)

    def match_and_use(
        self, pages: Pages, namespace: Hashable, rest: Page | None = None
    ) -> PrefixMatch:
        """``match``, and ``use`` of a path that is found, in a tick of its own."""
        match = self.match(pages, namespace, rest)
        if len(match.rows):
            self.advance()
            self.use(match.rows)
        return match

    def use(self, rows: Rows) -> None:
        """Make the pages of a path, and the window at its end, those used last."""
        size = self.geometry.window_pages
        self.touch(rows)
        self.touch_window(rows[max(0, len(rows) - size) :])
        self.resume[rows[-1]] = True
        # who shares a prefix comes back to where it branches off when its own pages are gone
        for end in (np.flatnonzero(self.children[rows] > 1) + 1).tolist():
            self.touch_window(rows[max(0, end - size) : end])

    def record(self, rows: Rows, request: int, priority: int, interval: int) -> None:
        """A request has extended a path, which is not empty: ``count_request``, ``use`` and
        ``mark_resume_points``."""
        self.count_request(rows, request, priority)
        self.use(rows)
        self.mark_resume_points(rows, interval)

    def mark_resume_points(self, rows: Rows, interval: int) -> None:
        """Decide which windows of a path that has grown are worth keeping.

        Args:
            interval: pages between those inside a prompt, see ``window.resume_points``.
        """
        size = self.geometry.window_pages
        usable = self.swa_device.present[rows] | self.swa_host.ready[rows]
        before = self.resume[rows]
        complete = complete_windows(usable, size)
        keep = resume_points(before, self._branches(rows), complete, interval)
        for end in (np.flatnonzero(keep & ~before) + 1).tolist():
            self.keep_inside(rows[max(0, end - size) : end])
        self.resume[rows] = keep

    def _branches(self, rows: Rows) -> NDArray[np.bool_]:
        """Pages of a path after which prefixes diverge, or have diverged."""
        branches: NDArray[np.bool_] = self.children[rows] > 1
        # one request fewer went on: it ended there; two fewer: one of them went elsewhere
        hits = self.hits[rows]
        branches[:-1] |= hits[:-1] - hits[1:] >= LEFT_THE_PATH
        return branches
