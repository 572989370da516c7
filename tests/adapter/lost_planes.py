"""Copies that leave a plane behind once the server has tried them at start, so that a test of all
planes can fail for each of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sglang_ext.adapter import byte_pages, factory
from sglang_ext.transfer.job import PageCopies, Part, PreparedCopies

WAYS = ("backup", "load")


def lose(pool: int, plane: int, way: str) -> None:
    """Have all hosts of byte planes leave one behind.

    Args:
        pool: its number, see ``byte_pages.in_order``.
        plane: of the pool.
        way: one of WAYS.
    """
    assert way in WAYS
    original, try_copies = byte_pages.kernel_copies, factory.try_copies

    def copies(planes: Sequence[Sequence[Any]], device: torch.device) -> PageCopies:
        lossy = [list(of_pool) for of_pool in planes]
        layers = tuple(torch.zeros_like(layer) for layer in lossy[pool][plane].layers)
        lossy[pool][plane] = dataclasses.replace(lossy[pool][plane], layers=layers)
        return _Lossy(original(planes, device), original(lossy, device), way)

    def tried(copies: Any, *given: Any) -> Any:
        copies.is_lossy = False
        bandwidth = try_copies(copies, *given)
        copies.is_lossy = True
        return bandwidth

    byte_pages.kernel_copies = copies
    factory.try_copies = tried


class _Lossy:
    """PageCopies: one set of planes for one way, another one for the other.

    Attributes:
        is_lossy: nothing is lost otherwise.
    """

    is_lossy = True

    def __init__(self, whole: PageCopies, lossy: PageCopies, way: str) -> None:
        self._whole, self._lossy, self._way = whole, lossy, way

    def prepare(self, parts: Sequence[Part]) -> PreparedCopies:
        """See PageCopies."""
        whole = self._whole.prepare(parts)
        if not self.is_lossy:
            return whole
        lossy = self._lossy.prepare(parts)
        return _Prepared(*((lossy, whole) if self._way == "backup" else (whole, lossy)))


class _Prepared:
    """PreparedCopies."""

    def __init__(self, back: PreparedCopies, forth: PreparedCopies) -> None:
        self.backup = back.backup
        self.load_layer = forth.load_layer
