"""Requests of a simulated engine."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.plan import Hold
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import Page, behind_pages, pages_of


class DeviceFullError(Exception):
    """The device has no room; a real engine retracts a request."""


@dataclasses.dataclass(eq=False)
class SimRequest:
    """A running request.

    Attributes:
        tokens: its prompt and the answer that it will get.
        prompt: tokens of the prompt.
        full, swa: (n,) its device slots, those of the table first.
        path: rows that it holds.
        protected: slots ``[0, protected)`` belong to the table; some slots of the last of
            ``path`` may not be among them: the request resumed inside that page.
    """

    tokens: NDArray[np.int64]
    prompt: int
    namespace: object
    full: Slots
    swa: Slots
    path: Rows
    protected: int
    computed: int
    lock: Hold
    waits_for: int
    number: int
    priority: int

    @property
    def done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self.computed >= len(self.tokens)


@dataclasses.dataclass(eq=False, frozen=True)
class Arrival:
    """A request that waits for storage, and the prefetch it waits for, if any."""

    tokens: NDArray[np.int64]
    namespace: object
    priority: int
    op: int | None


def whole_pages(tokens: NDArray[np.int64], geometry: Geometry) -> Pages:
    """What a request with this prompt looks for: one token must be left to compute."""
    return pages_of(tokens, geometry.whole_pages_in(max(0, len(tokens) - 1)), geometry)


def behind_whole_pages(tokens: NDArray[np.int64], geometry: Geometry) -> Page | None:
    """What is behind the whole pages, if a request may resume there."""
    if not geometry.resumes_inside:
        return None
    return behind_pages(tokens, len(tokens), geometry)
