"""Requests that resume and end inside a table page: the engine's side of ``core.inserts``."""

from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.core.inserts import Own, Tail
from sglang_ext.core.plan import Hold
from sglang_ext.core.table.columns import Rows, Slots
from sglang_ext.core.table.paths import Page, behind_pages, filled_up

if TYPE_CHECKING:
    from sglang_ext.adapter.device_pool import EngineDevicePool
    from sglang_ext.core.cache import PrefixCache


class InsidePages:
    """What a table page needs that a request shares in part.

    Args:
        chunk: tokens of the largest prefill of a step, None without chunking.
    """

    def __init__(
        self, index: "PrefixCache", device_pool: "EngineDevicePool", chunk: int | None
    ) -> None:
        self._index = index
        self._pool = device_pool
        self._geometry = index.geometry
        self._page = index.geometry.page_tokens
        self._device_page = index.geometry.device_page
        self._chunk = chunk

    def end(self, up_to: int) -> int:
        """How many of a finished request's first ``up_to`` positions are in whole device pages."""
        return up_to // self._device_page * self._device_page

    def rest(self, token_ids: Any, length: int) -> Page:
        """What the first ``length`` tokens name behind their whole pages; a view."""
        return behind_pages(token_ids, length, self._geometry)

    def may_load(self, pages: int, max_new: int) -> bool:
        """Whether a load may end inside a page. It takes up to a page more of the device than
        the engine is told, which can only be told of the tokens that the request uses: the
        tokens that it may generate make up for that, or room that no prefill of this step can
        need."""
        if max_new >= self._page:
            return True
        if self._chunk is None:
            return False
        table = self._index.table
        room = self._pool.free_pages() + table.device.n_evictable
        return room * self._page >= (pages + 2) * self._page + self._chunk

    def own(self, path: Rows, used: int, hold: Hold, row: torch.Tensor) -> Own | None:
        """See ``PrefixCache.own``.

        Args:
            used: tokens of the last page of ``path`` that the request reads.
            row: of the request; names its own slots from now on.
        """
        own = self._index.own(path, used // self._device_page, hold)
        if own is not None:
            self.write(row, (len(path) - 1) * self._page, own.full)
        return own

    def write(self, row: torch.Tensor, start: int, full: Slots) -> None:
        """Let the row of a request name slots, behind what was copied into them: the pass that
        runs now may read the row."""
        tokens = self._pool.row_tokens(full, full)
        with self._pool.forward.after(tokens):
            row[start : start + len(tokens)] = tokens.to(row.dtype)

    def wait(self) -> None:
        """The row is as it was written for whoever reads it now."""
        self._pool.forward.wait()

    def tail(
        self, token_ids: Any, row: torch.Tensor, start: int, end: int, own: Own | None
    ) -> Tail | None:
        """What a request has in row positions [start, end); None where the window has left it.

        Args:
            own: what it has there since just now, of the first of them.
        """
        if start == end:
            return None
        full, swa = self._pool.tail_slots(row[start:end])
        if own is not None:
            full[: len(own.full)], swa[: len(own.swa)] = own.full, own.swa
        if not swa.all():
            return None
        geometry = self._geometry
        rest = self.rest(token_ids, end + geometry.overlap)
        return Tail(filled_up(rest, geometry.name_tokens), full, swa)
