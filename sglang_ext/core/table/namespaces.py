"""Namespaces that have pages in a table."""

from collections.abc import Hashable

from sglang_ext.core.table.digest import namespace_digest

_FIRST_ROOT = -2
"""Parent of a first page is ``_FIRST_ROOT`` less a number that no other namespace ever had."""


class Namespaces:
    """What a table knows of each namespace: it lives as long as it has pages, for salts must not
    pile up.

    Attributes:
        roots: parent of its first pages.
        names: the inverse.
        seeds: of each root, what the digests of its pages begin with.
        first_pages: of each root, how many there are.
        numbers: of each root, a small number that is another one's when this one is gone: there
            are never more of them than a table has pages.
        changes: how often a namespace has come or gone.
    """

    def __init__(self) -> None:
        self.roots: dict[Hashable, int] = {}
        self.names: dict[int, Hashable] = {}
        self.seeds: dict[int, int] = {}
        self.first_pages: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.changes = 0
        self._free: list[int] = []
        self._next_root = 0

    def number_of(self, namespace: Hashable) -> int | None:
        """Its number; None if it has no pages."""
        root = self.roots.get(namespace)
        return None if root is None else self.numbers[root]

    def root_of(self, namespace: Hashable) -> int:
        """Its root; it begins to live if it does not. It must get a page, or be closed."""
        root = self.roots.get(namespace)
        if root is None:
            root = _FIRST_ROOT - self._next_root
            self._next_root += 1
            self.roots[namespace] = root
            self.names[root] = namespace
            self.seeds[root] = namespace_digest(root)
            self.first_pages[root] = 0
            self.numbers[root] = self._free.pop() if self._free else len(self.numbers)
            self.changes += 1
        return root

    def note_first_page(self, root: int) -> None:
        """It has another first page."""
        self.first_pages[root] += 1

    def leave(self, root: int) -> None:
        """A first page of it is gone."""
        self.first_pages[root] -= 1
        self.close_if_empty(root)

    def close_if_empty(self, root: int) -> None:
        """Forget it, if it has no pages."""
        if self.first_pages[root] == 0:
            del self.roots[self.names.pop(root)]
            del self.first_pages[root], self.seeds[root]
            self._free.append(self.numbers.pop(root))
            self.changes += 1
