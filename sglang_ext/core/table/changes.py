"""Which rows have gained or lost a copy, for somebody who follows a table from outside."""

import numpy as np

from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.table import PageTable

_NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class Changes:
    """Rows whose full-attention copies have changed in some tier since somebody looked.

    They are noted, not compared: what has become of them is in the table when somebody looks.
    A row may have left the table by then, or be another page.

    Args:
        table: tells of what happens from now on.
    """

    def __init__(self, table: PageTable) -> None:
        self._noted: list[Rows] = []
        self._n_noted = 0
        self._most = table.capacity
        for column in (table.device, table.host):
            column.tell_copies(self.note)
        table.tell_stored(self.note)

    def note(self, rows: Rows) -> None:
        """Copies of these rows may have changed."""
        self._noted.append(rows)
        self._n_noted += len(rows)
        if self._n_noted > 2 * self._most:
            self._noted = [self._each_once()]  # nobody has looked for long
            self._n_noted = len(self._noted[0])

    def take(self) -> Rows:
        """The rows, each once, in their order; from now on those that change after this call."""
        if not self._noted:
            return _NO_ROWS
        rows = self._each_once()
        self._noted, self._n_noted = [], 0
        return rows

    def _each_once(self) -> Rows:
        return np.unique(np.concatenate(self._noted))
