"""When pages expire: what is learned of their classes, as one number that ages have room for."""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled import least_worth as loops
from sglang_ext.core.compiled.bins import BINS, EDGES
from sglang_ext.core.compiled.returns import CLASSES, UNIT
from sglang_ext.core.eviction_policy import expected_uses
from sglang_ext.core.residency import Residency
from sglang_ext.core.retention.estimate import Estimate, Table, class_name
from sglang_ext.core.retention.retention import Retention
from sglang_ext.core.storage.attachment import Attachment
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.prospects import Place, uses_of
from sglang_ext.core.table.window import near_end

UNKNOWN = 0
"""Class of a page that no request has ended with: a prompt has at least one page."""
ENOUGH = (1 << UNIT) // 11
"""A copy has to be used with a chance of one in eleven."""
_WRITE = (1 << UNIT) // 32
"""A copy costs as much as one use in 32 of what it is of."""
_ON_THE_WAY = 4
"""Without a window near the end one part in so many of the pages between two windows is computed
again: the ends of earlier turns have windows too."""
Flags = NDArray[np.bool_]


class NoExpiry:
    """Of a policy that learns nothing."""

    is_learned = False
    copies_stay = False
    uses_per_1000 = 0.0
    near_end_pays = False

    def watch(self, residency: Residency, attachment: Attachment) -> None:
        """See Expiry."""

    def ended(self, rows: Rows, prompt: int) -> None:
        """See Expiry."""

    def note_lost(self, rows: Rows) -> None:
        """See Expiry."""

    def note_left(self, rows: Rows) -> None:
        """See Expiry."""

    def admits(self, rows: Rows) -> Flags:
        """See Expiry."""
        return np.ones(len(rows), dtype=np.bool_)

    def least_worth(self, rows: Rows, count: int) -> Rows:
        """See Expiry."""
        return rows[:count]

    def private_state(self) -> list[int]:
        """See Expiry."""
        return []


class Expiry:
    """Tells the table how long pages of each class stay, and what is worth a copy on the host.

    A page expires when it is worth no more than what is lost for good to make room, its *price*.
    What expires first goes first. Where least recently used is found to be better, all pages
    expire at once, and then it is that.

    Above a host no page stays longer on the device than those that go from there have been there:
    what has expired goes first, and of the rest the least recently used, for which a load is all
    that it costs. So the device has no page for long that the host would have to find room for.

    What was learned of the traffic outlives a flush.

    Args:
        retention: for the last tier: all pages that can be found count.
        checkpoint_pages, window_cost: see ``BackupPolicy``.

    Attributes:
        price: see above; in 2**-30 uses a request.
    """

    def __init__(
        self, retention: Retention, checkpoint_pages: int = 0, window_cost: int = 0
    ) -> None:
        self._retention = retention
        self._checkpoint_pages, self._window_cost = checkpoint_pages, window_cost
        self.price = 0
        self._lost_value = self._lost_pages = 0
        # ticks of the table that a page stays on a device above a host, at most; and by how many
        # those that left have expired before
        self._longest = self._late = self._left = 0
        self._was_learned = False
        self._admitted = np.ones((CLASSES, BINS), dtype=np.bool_)
        # ticks of the table in a number of requests, as of the last while
        self._ticks = self._requests = 1

    def watch(self, residency: Residency, attachment: Attachment) -> None:
        """There is another table, with nothing in it."""
        self._residency, self._table = residency, residency.table
        self._table.go_by(self)
        self._attachment = attachment
        self._most = np.zeros(residency.table.capacity, dtype=np.int32)
        self._since = self._table.tick, self._retention.tick
        self._near, self._apart = near_end(self._table.geometry)
        self._tell()

    @property
    def is_learned(self) -> bool:
        """Whether what is learned decides, or least recently used."""
        return self._retention.learned(0)

    @property
    def copies_stay(self) -> bool:
        """Whether a copy on the host is worth its room while the page is on the device too: it is
        written again otherwise."""
        requests = self._longest * self._requests // self._ticks
        return self.is_learned and self.price * requests < _WRITE

    @property
    def near_end_pays(self) -> bool:
        """Whether a window near the end of a prompt is worth its room: prompts part from earlier
        ones there so often that it saves more than pages would that take as many bytes."""
        ends, near = self._retention.ends
        between = self._checkpoint_pages or self._near
        return near * between > _ON_THE_WAY * ends * self._window_cost

    @property
    def uses_per_1000(self) -> float:
        """The price in uses in 1,000 requests."""
        return 1000 * self.price / (1 << UNIT)

    @property
    def estimate(self) -> Estimate:
        """What pages are worth."""
        return self._retention.estimate

    @property
    def requests_ended(self) -> int:
        """See Prospects."""
        return self._retention.tick

    def ended(self, rows: Rows, prompt: int) -> None:
        """A request has ended; to be told once for each.

        Args:
            rows: its path.
            prompt: the whole pages of its prompt among them.

        Mutates: classes and ages of the path.
        """
        table, retention = self._table, self._retention
        # a tail is no page that others could have
        pages = len(rows) - table.is_tail(int(rows[-1])) if len(rows) else 0
        prompt = min(prompt, pages)
        if prompt < 1:
            return
        kinds = retention.request(table.digest[rows[:pages]], prompt, self._apart)
        table.kind[rows[:pages]] = kinds
        table.kind[rows[pages:]] = kinds[-1]
        table.used[rows] = retention.tick
        if retention.tick % retention.rebuild == 0:
            self._learn()
        self._residency.use(rows)
        table.keep_windows_near_end(rows[:prompt], copy_one=self.near_end_pays)
        self._residency.candidates.note_use(rows)

    def note_lost(self, rows: Rows) -> None:
        """Pages go of which no copy is left: what they were worth is the price of room."""
        table, retention = self._table, self._retention
        worth, count = loops.worth_of_known(
            rows, table.kind, table.used, retention.tick, retention.estimate.values
        )
        self._lost_value += worth
        self._lost_pages += count

    def note_left(self, rows: Rows) -> None:
        """Pages leave a device above a host."""
        self._late += int((self._table.tick - self._table.last_use(rows)).sum())
        self._left += len(rows)

    def admits(self, rows: Rows) -> Flags:
        """Which pages are worth a copy on the host: those that are likely enough to be used before
        they expire, and those above something that is on the host alone, which is nothing without
        them. In storage a page may be found by others too."""
        if self._attachment.is_there:
            return np.ones(len(rows), dtype=np.bool_)
        admitted: Flags = self._admitted.take(self._cells(rows))
        return admitted | self._residency.candidates.are_needed(rows)

    def least_worth(self, rows: Rows, count: int) -> Rows:
        """Those of pages that expire next that are worth least, in that order: when many go at a
        time, some of them expire sooner and are worth more than others.

        Args:
            rows: in the order in which they expire.
            count: so many of them, or all.
        """
        table, least = self._table, np.empty(min(count, len(rows)), dtype=np.int64)
        loops.least_worth(
            rows,
            table.parent,
            table.kind,
            table.used,
            self._retention.tick,
            self._retention.estimate.ranks,
            self._most,
            least,
        )
        return least

    # ---- on the host -----------------------------------------------------------

    def worth(self, rows: Rows) -> NDArray[np.float64]:
        """See Prospects: what is learned, and of one class and age by the last use; where that
        does not decide, by ``expected_uses`` for a request."""
        ages = self._ages(rows)
        if self.is_learned:
            return self.estimate.values.take(self._cells(rows)) + 1.0 / (ages + 1)
        return expected_uses(self._table.forks[rows], ages)

    def places_of(self, rows: Rows) -> list[Place]:
        """See Prospects."""
        table = self._table
        kinds = table.kind[rows].tolist() if self.is_learned else uses_of(table.forks[rows])
        return list(zip(itertools.repeat(0), kinds, table.used[rows].tolist(), strict=False))

    def worth_of(self, place: Place) -> float:
        """See Prospects."""
        _, kind, last = place
        age = self._retention.tick - last
        if self.is_learned:
            return self._retention.estimate.value(kind, age) + 1.0 / (age + 1)
        return kind / (age + 1.0)

    # ---- what is learned -------------------------------------------------------

    def _ages(self, rows: Rows) -> NDArray[np.int64]:
        return self._retention.tick - self._table.used[rows]

    def _cells(self, rows: Rows) -> NDArray[np.int64]:
        table, cells = self._table, np.empty(len(rows), dtype=np.int64)
        loops.cells_of(rows, table.kind, table.used, self._retention.tick, cells)
        return cells

    def _learn(self) -> None:
        table, retention = self._table, self._retention
        if self._lost_pages:
            self.price = self._lost_value // self._lost_pages
        self._lost_value = self._lost_pages = 0
        if self._left:
            # pages that all expire at once have stayed for as long as they are late
            longest = (self._longest if self._was_learned else 0) + self._late // self._left
            self._longest = max(0, min(longest, table.longest_stay))
        self._late = self._left = 0
        if self.is_learned != self._was_learned:
            self._residency.candidates.look_at_tails().classify_anew()
        tick, requests = self._since
        # a request that ends has at least one tick; whoever divides by them need not rely on that
        self._ticks = max(1, table.tick - tick)
        self._requests = retention.tick - requests
        self._since = table.tick, retention.tick
        self._tell()

    def _tell(self) -> None:
        """What holds until the next table."""
        table, estimate = self._table, self._retention.estimate
        self._was_learned = self.is_learned
        self._admitted[:] = True
        table.stay[:] = 0
        if not self.is_learned:
            return
        expired = estimate.values <= self.price
        bins = np.where(expired.any(axis=1), expired.argmax(axis=1), BINS)
        ticks = EDGES[bins] * self._ticks // self._requests
        above_host = self._residency.tier is not None
        table.stay[:] = np.minimum(ticks, self._longest if above_host else table.longest_stay)
        table.stay[UNKNOWN] = 0
        self._admitted[:] = _returns(estimate.chances, expired) >= ENOUGH
        self._admitted[UNKNOWN] = True

    def explain(self) -> dict[str, Any]:
        """Who decides, the price in uses in 1,000 requests, and how long classes stay, in ticks of
        the table."""
        found = self._retention.found(0)
        return {
            "learned": self.is_learned,
            "price": round(self.uses_per_1000, 3),
            "found": dict(zip(("lru", "learned"), found, strict=True)),
            "stay": {class_name(kind): int(self._table.stay[kind]) for kind in range(1, CLASSES)},
        }

    def private_state(self) -> list[int]:
        """Numbers that decisions depend on; for ``fingerprint``."""
        found = self._retention.found(0)
        lost = self._lost_value, self._lost_pages
        ticks = self._ticks, self._requests, *self._since
        left = self._longest, self._late, self._left
        told = *found, *lost, *left, *self._retention.ends, *ticks
        return [self._retention.tick, self.is_learned, self.price, *told]


def _returns(chances: Table, expired: Flags) -> Table:
    """(classes, bins) chance in 2**-30 that a page is used before it expires; the same as
    ``Estimate.returns_while_worth`` for all at once, but for what that rounds."""
    one = 1 << UNIT
    left, stays_away = np.full(CLASSES, one, dtype=np.int64), np.empty_like(chances)
    for b in range(BINS - 1, -1, -1):
        left -= (left * chances[:, b]) >> UNIT
        left[expired[:, b]] = one
        stays_away[:, b] = left
    return one - stays_away
