"""What an operator does to a simulated rank, and what must come of it."""

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import FREE, PAD
from sglang_ext.core.control.drops import Dropped
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import pages_of
from sglang_ext.testing import model_quota
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.watch import require

Prompt = NDArray[np.int64]


class _Pinned(NamedTuple):
    """What was asked for, what of it is pinned, and whether all of that was on the host."""

    tokens: Prompt
    namespace: Hashable
    pages: Pages
    was_whole: bool = False


class SimControl:
    """Pins, unpins, drops and quotas on one rank.

    Attributes:
        seen: what happened.
    """

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self.seen = engine.seen
        # by the row with which it ends
        self._pinned: dict[int, _Pinned] = {}
        # bytes that namespaces with quotas had when somebody looked last
        self._used: dict[Hashable, int] = {}

    @property
    def pinned(self) -> list[tuple[Prompt, Hashable]]:
        """Prompts that are pinned, and their namespaces."""
        return [(pin.tokens, pin.namespace) for pin in self._pinned.values()]

    def _pages(self, tokens: Prompt) -> Pages:
        geometry = self._engine.geometry
        return pages_of(tokens, geometry.whole_pages_in(len(tokens)), geometry)

    def pin(self, tokens: Prompt, namespace: Hashable) -> None:
        """Pin what a request could resume with."""
        index, pages = self._engine.index, self._pages(tokens)
        path = index.match(pages, namespace).rows
        if len(path) == 0:
            return
        if not index.pins.fits(path):
            self.seen.add("too much to pin")
            return
        if not index.pins.is_within_quota(path):
            self.seen.add("pin beyond a quota")
            return
        end = int(path[-1])
        index.pins.add(path, len(pages))
        self._pinned[end] = _Pinned(tokens, namespace, pages[: len(path)].copy())
        self.seen.add("pin")
        if not index.pins.is_whole(end):
            self.seen.add("pin with a copy")
            self._engine.submit(index.pins.copy(end))

    def unpin(self, tokens: Prompt, namespace: Hashable) -> None:
        """Pin a prompt no longer."""
        index, pages = self._engine.index, self._pages(tokens)
        end = index.pins.of(index.table.lookup(pages, namespace), len(pages))
        if end is not None:
            self._unpin(end)
            self.seen.add("unpin")

    def unpin_all(self) -> None:
        """Pin nothing any longer."""
        for end in self._engine.index.pins.ends:
            self._unpin(end)

    def _unpin(self, end: int) -> None:
        self._engine.index.pins.remove(end)
        del self._pinned[end]

    def look(self) -> None:
        """Give up pins that came to nothing; once a step."""
        index = self._engine.index
        for end in index.pins.ends:
            pin = self._pinned[end]
            if index.pins.is_there(end) and index.pins.is_whole(end):
                self._pinned[end] = pin._replace(was_whole=True)
            elif not pin.was_whole and not index.pending[TransferKind.BACKUP]:
                self.seen.add("pin given up")
                self._unpin(end)

    def drop(self, tokens: Prompt, namespace: Hashable) -> None:
        """Drop a prompt; what goes is what the definition says."""
        engine, pages = self._engine, self._pages(tokens)
        goes = self._to_go(tokens, len(pages), namespace)
        rest = tokens[len(pages) * engine.geometry.page_tokens :]
        self._check_drop(goes, engine.index.drops.prompt(pages, namespace, rest))

    def drop_namespace(self, namespace: Hashable) -> None:
        """Drop a namespace."""
        table = self._engine.index.table
        goes = [row for row in self._rows() if table.namespace(table.path(row)) == namespace]
        self._check_drop(goes, self._engine.index.drops.namespace(namespace))

    def _rows(self) -> list[int]:
        rows: list[int] = np.flatnonzero(self._engine.index.table.parent != FREE).tolist()
        return rows

    def _to_go(self, tokens: Prompt, pages: int, namespace: Hashable) -> list[int]:
        """By definition: what goes on from a prompt, and the pages in front of its end that lead
        to nothing else, unless a shorter prefix is pinned there."""
        table, goes, path = self._engine.index.table, set[int](), list[int]()
        for row in self._rows():
            rows = table.path(row)
            if table.namespace(rows) != namespace:
                continue
            prompt = table.prompt(rows)
            prompt = prompt[prompt != PAD]
            if len(rows) > pages and np.array_equal(prompt[: len(tokens)], tokens):
                goes.add(row)
            elif len(rows) <= pages and np.array_equal(prompt, tokens[: len(prompt)]):
                path += [] if table.is_tail(row) else [row]
        for row in sorted(path, key=lambda row: -int(table.depth[row])):
            shorter = table.depth[row] + 1 < pages and row in self._pinned
            children = np.flatnonzero(table.parent == row).tolist()
            if shorter or not goes.issuperset(children):
                break
            goes.add(row)
        return list(goes)

    def _check_drop(self, goes: list[int], dropped: Dropped) -> None:
        """What should go has gone, but for what requests and their loads hold."""
        table = self._engine.index.table
        stays = [row for row in goes if table.parent[row] != FREE]
        loads = self._engine.index.pending[TransferKind.LOAD].values()
        paths = [request.path for request in self._engine.running]
        paths += [load.path for load in loads]
        held = {row for path in paths for row in path.tolist()}
        require(held.issuperset(stays), "a drop left a page behind")
        require(dropped == (len(goes) - len(stays), len(stays)), "a drop counts wrong")
        self.seen.add("drop with pages held" if stays else "drop")
        for end in set(goes) & self._pinned.keys():
            del self._pinned[end]

    def set_quota(self, namespace: Hashable, bound: int | None) -> None:
        """Give a namespace a quota, or none."""
        index = self._engine.index
        if index.host_tier is None:
            return
        if bound is None:
            self.seen.add("quota cleared" if index.own_room.clear(namespace) else "no quota")
            self._used.pop(namespace, None)
        else:
            used = model_quota.used(index, namespace)
            self.seen.add("quota below what is used" if bound < used else "quota")
            index.own_room.set(namespace, bound)

    def _check_quotas(self) -> None:
        """A namespace never gets more while it has more than its quota."""
        index = self._engine.index
        for namespace, bound in index.quotas.bounds.items():
            used = model_quota.used(index, namespace)
            require(index.own_room.used(namespace) == used, "bytes of a namespace are others")
            most = max(bound, self._used.get(namespace, used))
            require(used <= most, f"{namespace} has {used} bytes, and may have {bound}")
            self._used[namespace] = used

    def check_settled(self) -> None:
        """Some steps after all has ended, what is beyond a quota is what pins keep."""
        index, table = self._engine.index, self._engine.index.table
        for namespace, bound in index.quotas.bounds.items():
            full, window = set[int](), set[int]()
            for end in index.pins.ends:
                path = table.path(end)
                if table.namespace(path) == namespace:
                    full |= set(path.tolist())
                    window |= set(index.window_of(path).tolist())
            pinned = index.quotas.bytes_of(len(full), len(window))
            used = index.own_room.used(namespace)
            require(used <= max(bound, pinned), f"{namespace} keeps {used} bytes of {bound}")
            require(index.own_room.is_settled(namespace), "a quota is never settled")

    def flushed(self) -> None:
        """Nothing is pinned any more."""
        self._pinned.clear()
        self._used.clear()

    def check(self) -> None:
        """What is pinned, and was on the host once, is there; nothing else is pinned. Quotas
        hold."""
        self._check_quotas()
        index, table = self._engine.index, self._engine.index.table
        require(set(index.pins.ends) == self._pinned.keys(), "other prefixes are pinned")
        for pin in self._pinned.values():
            rows = table.lookup(pin.pages, pin.namespace)
            if pin.was_whole:
                require(len(rows) == len(pin.pages), "a pinned page left the table")
                there = table.host.ready[rows].all()
                there &= table.swa_host.ready[index.window_of(rows)].all()
                require(bool(there), "a pinned page left the host")
