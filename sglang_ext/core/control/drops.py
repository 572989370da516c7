"""Drops: prefixes and namespaces that are forgotten because somebody says so."""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from sglang_ext.core.control.pins import Pins
from sglang_ext.core.device.look_ahead import LookAhead
from sglang_ext.core.moves.backups import Backups
from sglang_ext.core.moves.log import TransferLog
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import Page


class Dropped(NamedTuple):
    """What came of it.

    Attributes:
        pages: that are in no tier but storage any more.
        held: that stay, because requests that run use them.
    """

    pages: int
    held: int


class Drops:
    """Forgets pages on the device and on the host. O(those), not O(all)."""

    def __init__(
        self,
        residency: Residency,
        backups: Backups,
        ahead: LookAhead,
        log: TransferLog,
        pins: Pins,
    ) -> None:
        self._residency = residency
        self._table = residency.table
        self._backups = backups
        self._ahead = ahead
        self._log = log
        self._pins = pins

    def namespace(self, namespace: Hashable) -> Dropped:
        """Drop all prefixes of a namespace."""
        root = self._table.root(namespace)
        return Dropped(0, 0) if root is None else self._drop(self._table.below(root))

    def prompt(self, pages: Pages, namespace: Hashable, rest: Page) -> Dropped:
        """Drop a prompt, what goes on from it, and of the pages in front of its end those that
        lead to nothing else and that no pin ends with.

        Args:
            pages: (n, name_tokens) its whole pages.
            rest: (m,) tokens behind the positions of these pages, less than a page and what
                names overlap by.
        """
        table, root = self._table, self._table.root(namespace)
        if root is None:
            return Dropped(0, 0)
        path = table.lookup(pages, namespace)
        rows = path[:0]
        if len(path) == len(pages):
            rows = self._going_on(int(path[-1]) if len(path) else root, rest)
        own, gone = len(path), int(np.count_nonzero(np.isin(table.parent[rows], path[-1:])))
        pinned = set(self._pins.ends)
        while own and table.children[path[own - 1]] == gone:
            if own < len(pages) and int(path[own - 1]) in pinned:
                break
            own, gone = own - 1, 1
        return self._drop(np.concatenate((path[own:], rows)))

    def _going_on(self, parent: int, rest: Page) -> Rows:
        """All rows below a row, or the root of a namespace, that go on with some tokens."""
        rows = self._table.below(parent)
        if len(rest) == 0 or len(rows) == 0:
            return rows
        children = rows[self._table.parent[rows] == parent]
        begins = (self._table.tokens[children, : len(rest)] == rest).all(axis=1)
        below = [self._table.below(int(child)) for child in children[begins]]
        return np.concatenate((children[begins], *below))

    def _drop(self, rows: Rows) -> Dropped:
        rows = np.sort(rows)
        if len(rows) == 0:
            return Dropped(0, 0)
        self._pins.forget(rows)
        for backup in list(self._log.pending[TransferKind.BACKUP].values()):
            if not backup.abandoned and np.isin(backup.path[-1], rows):
                self._backups.abandon(backup)
        held = self._table.device.locks[rows] > 0
        self._residency.drop(rows[~held])
        self._ahead.invalidate()
        return Dropped(int(np.count_nonzero(~held)), int(np.count_nonzero(held)))
