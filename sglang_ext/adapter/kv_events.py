"""KV events: what routers that listen to the engine's publisher are told.

Events follow full-attention copies that can be read, one medium for each tier. Nothing is
recorded where it happens: once in a scheduler step, what subscribers know of the rows that have
changed is compared with the table, and they are told the difference. So whatever the order of
operations is, their view is that of the table.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    StorageMedium,
)

from sglang_ext.adapter.block_hashes import BlockHashes, Namings, units
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.compiled.constants import FREE
from sglang_ext.core.table.changes import Changes
from sglang_ext.core.table.columns import Rows, SlotColumn
from sglang_ext.core.table.table import STORED, PageTable

Flags = NDArray[np.bool_]


class KvEvents:
    """Events since they were last taken; the engine's scheduler takes them in every step.

    Args:
        index: the cache, before its first request.
        namings: how pages are called.
        storage: name of the storage backend, None while there is none.
    """

    def __init__(
        self, index: PrefixCache, namings: Namings, storage: Callable[[], str | None]
    ) -> None:
        self._index = index
        self._namings = namings
        self._storage = storage
        self.cleared()

    def cleared(self) -> None:
        """The cache has forgotten everything, and has another table now."""
        self._view = View(self._index.table, self._namings, self._storage)
        self._queue: list[KVCacheEvent] = [AllBlocksCleared()]

    def take(self) -> list[KVCacheEvent]:
        """Events by which a view of the pages before becomes that of now. In each medium pages
        come after those in front of them, then go before them."""
        events = [*self._queue, *self._view.differences()]
        self._queue = []
        return events


class View:
    """What subscribers know of one table."""

    def __init__(
        self, table: PageTable, namings: Namings, storage: Callable[[], str | None]
    ) -> None:
        self._table, self._pairs = table, namings.pairs
        self._changes = Changes(table)
        self._hashes = hashes = BlockHashes(table, namings)
        on_disk, elsewhere = (in_storage(table, storage, files=files) for files in (True, False))
        self._media = (
            # a request whose load runs may have put pages behind those that are not read yet
            Medium(StorageMedium.GPU, hashes, readable(table.device), in_order=True),
            # not every page on the host has those in front of it there too: they are on the device
            Medium(StorageMedium.CPU, hashes, readable(table.host), in_order=False),
            Medium(StorageMedium.DISK, hashes, on_disk, in_order=False),
            Medium(StorageMedium.EXTERNAL, hashes, elsewhere, in_order=False),
        )

    def differences(self) -> list[KVCacheEvent]:
        """Events that make the view that of the table; from now on it is."""
        rows = self._changes.take()
        if len(rows) == 0:
            return []
        same = self._hashes.are_known(rows)
        # first of all media: a row that is another page now has other hashes afterwards
        for medium in self._media:
            medium.forget(rows, same, self._table.parent)
        missing = [self._from_the_front(medium.missing(rows)) for medium in self._media]
        for of_medium in missing:
            self._hashes.find(of_medium)
        events = []
        for medium, of_medium in zip(self._media, missing, strict=True):
            events += medium.stored(of_medium, self._table, pairs=self._pairs)
            events += medium.removed()
            if len(too_early := medium.too_early()):
                self._changes.note(too_early)
        return events

    def _from_the_front(self, rows: Rows) -> Rows:
        """Rows in the order of their depth."""
        ordered: Rows = rows[np.argsort(self._table.depth[rows], kind="stable")]
        return ordered


def readable(column: SlotColumn) -> Callable[[Rows], Flags]:
    """Which rows have a copy in a column that a transfer is not still writing."""
    return lambda rows: column.ready[rows]


def in_storage(
    table: PageTable, storage: Callable[[], str | None], *, files: bool
) -> Callable[[Rows], Flags]:
    """Which rows are in storage, if that is files, or if it is something else."""

    def there(rows: Rows) -> Flags:
        if (storage() == "file") is not files:
            return np.zeros(len(rows), dtype=np.bool_)
        # a row that has left the table keeps what is said here
        return (table.stored[rows] == STORED) & (table.parent[rows] != FREE)

    return there


class Medium:
    """What subscribers know of one tier.

    Rows can have pages in common: those with equal beginnings where the engine's page is smaller
    than the table's, and those of namespaces that hashes do not tell apart. A page is there as
    long as one of its rows is.

    Args:
        there: which rows have a copy that counts.
        in_order: tell of a row only if the one in front of it is told.
    """

    def __init__(
        self,
        name: StorageMedium,
        hashes: BlockHashes,
        there: Callable[[Rows], Flags],
        *,
        in_order: bool,
    ) -> None:
        self._name = name
        self._hashes = hashes
        self._there = there
        self._in_order = in_order
        self._told: Flags = np.zeros(len(hashes.counts), dtype=np.bool_)
        self._rows_with: Counter[int] = Counter()
        self._lost: dict[int, None] = {}
        self._too_early: list[int] = []

    def forget(self, rows: Rows, same: Flags, parent: NDArray[np.int32]) -> None:
        """Note what is lost: rows that are told and not there, or another page now.

        Args:
            same: (n,) whether the rows still are the pages that their hashes are of.
            parent: of every row in the table.
        """
        hashes, told = self._hashes, self._told
        gone = rows[told[rows] & ~(same & self._there(rows))]
        told[gone] = False
        if self._in_order and len(gone):
            gone = np.concatenate((gone, *self._orphans(rows, parent)))
        for page in reversed(hashes.of(gone[np.argsort(hashes.depth[gone], kind="stable")])):
            self._rows_with[page] -= 1
            if self._rows_with[page] == 0:
                del self._rows_with[page]
                self._lost[page] = None

    def _orphans(self, rows: Rows, parent: NDArray[np.int32]) -> Iterator[Rows]:
        """Rows that are told no longer, since those in front of them are not: they have gone and
        come again, and what is in front of them is not read back yet."""
        while True:
            above = parent[rows]
            orphans = rows[self._told[rows] & (above >= 0) & ~self._told[np.maximum(above, 0)]]
            if len(orphans) == 0:
                return
            self._told[orphans] = False
            yield orphans

    def missing(self, rows: Rows) -> Rows:
        """Rows that are there and not told."""
        return rows[self._there(rows) & ~self._told[rows]]

    def stored(self, rows: Rows, table: PageTable, *, pairs: bool) -> list[BlockStored]:
        """Tell of rows.

        Args:
            rows: in the order of their depth, whose hashes are known.
            pairs: see ``Namings``.
        """
        hashes, runs = self._hashes, Runs(self._name, self._hashes)
        size, per_page = table.geometry.device_page, table.geometry.slots_per_page
        above = table.parent[rows]
        # one list each: what is made for every row would have the collector look at all there is
        pages = hashes.hashes[rows].reshape(-1).tolist()
        of_positions = units(table.tokens[rows], table.geometry, pairs=pairs)
        at = -per_page
        for row, parent, count, before in zip(
            rows.tolist(),
            above.tolist(),
            hashes.counts[rows].tolist(),
            hashes.hashes[np.maximum(above, 0), -1].tolist(),
            strict=True,
        ):
            at += per_page
            if self._in_order and parent >= 0 and not self._told[parent]:
                self._too_early.append(row)
                continue
            self._told[row] = True
            last = before if parent >= 0 else None
            for number in range(at, at + count):
                page = pages[number]
                self._rows_with[page] += 1
                if page in self._lost:  # by another row, just now
                    del self._lost[page]
                elif self._rows_with[page] == 1:
                    own = of_positions[number * size : (number + 1) * size]
                    runs.add(row, page, last, own)
                last = page
        return runs.events

    def removed(self) -> list[BlockRemoved]:
        """Tell of what is lost."""
        lost, self._lost = list(self._lost), {}
        return [BlockRemoved(block_hashes=lost, medium=self._name)] if lost else []

    def too_early(self) -> Rows:
        """Rows of which could not be told yet."""
        rows, self._too_early = self._too_early, []
        return np.array(rows, dtype=np.int64)


class Runs:
    """Events that pages are there; pages that follow one another are one event.

    Attributes:
        events: in an order in which none needs a page of a later one.
    """

    def __init__(self, medium: StorageMedium, hashes: BlockHashes) -> None:
        self.events: list[BlockStored] = []
        self._medium = medium
        self._hashes = hashes
        self._by_last_page: dict[int | None, BlockStored] = {}

    def add(self, row: int, page: int, before: int | None, positions: list[Any]) -> None:
        """A page of a row, after the page in front of it.

        Args:
            page, before: hashes; ``before`` is None for the first page of a prompt.
            positions: what they are of, see ``units``.
        """
        event = self._by_last_page.pop(before, None)
        if event is None:
            event = self._begin(row, before, len(positions))
        event.block_hashes.append(page)
        event.token_ids.extend(positions)
        self._by_last_page[page] = event

    def _begin(self, row: int, before: int | None, block_size: int) -> BlockStored:
        naming = self._hashes.naming(row)
        event = BlockStored(
            block_hashes=[],
            parent_block_hash=before,
            token_ids=[],
            block_size=block_size,
            lora_id=None,
            medium=self._medium,
            cache_salt=naming.cache_salt,
            lora_name=naming.lora_name,
        )
        self.events.append(event)
        return event
