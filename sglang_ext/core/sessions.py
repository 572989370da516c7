"""Sessions that are open: what one of them has used goes after everything else.

A session is a name that a client gives to requests that belong together, and closes when there
will be no more of them. Its pages are not locked: under pressure they go too, in the same order.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.residency import Residency
from sglang_ext.core.table.columns import Rows


class _Used(NamedTuple):
    """Pages that a session has used: their rows, and what tells whether they still have them."""

    rows: Rows
    generations: NDArray[np.int32]


_NOTHING = _Used(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32))


class Sessions:
    """Which pages open sessions have used."""

    def __init__(self, residency: Residency) -> None:
        self._candidates = residency.candidates
        self._table = residency.table
        self._used: dict[str, _Used] = {}

    def use(self, session: str, path: Rows) -> None:
        """A request of a session leaves a path behind; the session is open from now on."""
        known = self._current(session)
        new = np.setdiff1d(path, known)
        rows = np.concatenate((known, new))
        self._used[session] = _Used(rows, self._table.generation[rows])
        self._refer(new, 1)

    def close(self, session: str) -> None:
        """A session has ended; what no other one has used goes by its last use again."""
        rows = self._current(session)
        self._used.pop(session, None)
        self._refer(rows, -1)

    def _current(self, session: str) -> Rows:
        """Rows that still have the pages of a session."""
        rows, generations = self._used.get(session, _NOTHING)
        current: Rows = rows[self._table.generation[rows] == generations]
        return current

    def _refer(self, rows: Rows, sessions: int) -> None:
        if len(rows):
            self._table.refer(rows, sessions)
            self._candidates.note_use(rows)
            self._candidates.look_if_many()
