"""What requests hand over to the table at their checkpoints."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_ext.core.inserts import Own, Tail
from sglang_ext.core.table.columns import Rows, Slots

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    from sglang_ext.adapter.device_pool import EngineDevicePool
    from sglang_ext.adapter.full_alone import FullAloneDevicePool
    from sglang_ext.adapter.inside import InsidePages
    from sglang_ext.adapter.keys import Keys
    from sglang_ext.adapter.locks import Locks
    from sglang_ext.adapter.window_only import WindowOnlyDevicePool
    from sglang_ext.core.cache import PrefixCache


class Owned(NamedTuple):
    """What a request owns at a checkpoint; positions in its row.

    The table has ``[0, shared)`` already. ``[owned, whole)`` are whole pages of the request, or
    will be: of a page that it resumed inside, ``[owned, shared)`` is not its own yet.
    ``[whole, end)`` is its tail, which only a finished request has.
    """

    shared: int
    owned: int
    whole: int
    end: int

    @property
    def used(self) -> int:
        """Tokens that it reads of the page that it resumed inside."""
        return self.shared - self.owned

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing that the table has not."""
        return self.end <= self.shared


class Handovers:
    """Takes over what requests own: their slots, and what their rows name.

    Args:
        inside: where requests resume and end inside a page.
    """

    def __init__(
        self,
        index: "PrefixCache",
        device_pool: "EngineDevicePool | WindowOnlyDevicePool | FullAloneDevicePool",
        rows: "ReqToTokenPool",
        keys: "Keys",
        locks: "Locks",
        inside: "InsidePages | None",
    ) -> None:
        self._index = index
        self._pool = device_pool
        self._rows = rows
        self._keys = keys
        self._locks = locks
        self._inside = inside
        self._geometry = index.geometry
        self._page = index.geometry.page_tokens

    def owned(self, req: "Req", up_to: int) -> Owned:
        """What a request owns of the first ``up_to`` positions of its row."""
        shared, page = req.kv.cache_protected_len, self._page
        # in a batch that mixes prefills and decodes the last token has KV before it has a name
        up_to = self._geometry.named(min(up_to, len(req.full_untruncated_fill_ids)))
        first, pages = shared // page, up_to // page
        if (short := pages - first - self._pool.takes(pages - first)) > 0:
            # what there are no numbers for stays with the request
            self._index.evict_device(short, 0)
            up_to = min(up_to, (first + self._pool.takes(pages - first)) * page)
        whole = end = up_to // page * page
        if self._inside is not None and req.finished():
            end = self._inside.end(up_to)
        return Owned(shared, first * page, whole, end)

    def take(self, req: "Req", owned: Owned, number: int, priority: int) -> tuple[Rows, int] | None:
        """Take over what a request owns.

        Args:
            number, priority: see ``PrefixCache.insert``.

        Returns:
            The path of its prefix, and how many tokens of it the request has; None without room
            for a page of its own: then it stays as it is.
        """
        row = self._rows.req_to_token[req.kv.req_pool_idx]
        own = None
        if owned.used and (own := self._make_own(req, owned.used, row)) is None:
            return None
        full, swa = self._slots(req.kv, owned, own, row)
        first = owned.owned // self._page
        rows = self._index.insert(
            self._keys.pages(req.full_untruncated_fill_ids, owned.whole + self._geometry.overlap),
            (req.extra_key, req.cache_salt),
            first,
            full,
            swa,
            number,
            priority,
            self._tail(req, owned, own, row),
        )
        repeat = self._geometry.whole_pages_in(len(req.origin_input_ids) - 1)
        if first <= repeat <= len(rows):
            self._index.note_prompt_end(rows, repeat)
        taken = rows[first : owned.whole // self._page]
        self._pool.stays_with_request(full[len(taken) :])
        self._name(row, owned, taken, full)
        tokens = min(len(rows) * self._page, owned.end)
        if own is not None and tokens < owned.shared:
            self._give_back_lost(req.kv, owned, own)
        return rows, tokens

    def _make_own(self, req: "Req", used: int, row: torch.Tensor) -> Own | None:
        """Slots of its own for the tokens that a request uses of the page that it resumed
        inside, which it holds no longer; None without room."""
        assert self._inside is not None
        assert req.lock is not None
        path, number = req.lock.node.rows, req.lock.receipt.node_id
        assert number is not None
        own = self._inside.own(path, used, self._locks[number], row)
        if own is not None:
            self._locks[number] = own.hold
            req.lock.node = req.last_node = self._keys.prefix(path[:-1])
            req.kv.cache_protected_len -= used
        return own

    def _slots(
        self, kv: "ReqKvInfo", owned: Owned, own: Own | None, row: torch.Tensor
    ) -> tuple[Slots, Slots]:
        """Slots of the whole pages, and their sliding-window peers."""
        left = max(0, kv.get_evicted_seqlen(ComponentType.SWA) - owned.owned)
        given_back = min(left, owned.whole - owned.owned)
        return self._pool.owned_slots(row[owned.owned : owned.whole], given_back, own)

    def _tail(self, req: "Req", owned: Owned, own: Own | None, row: torch.Tensor) -> Tail | None:
        if self._inside is None or owned.end == owned.whole:
            return None
        begin = own if owned.whole == owned.owned else None
        tokens = req.full_untruncated_fill_ids
        return self._inside.tail(tokens, row, owned.whole, owned.end, begin)

    def _name(self, row: torch.Tensor, owned: Owned, taken: Rows, full: Slots) -> None:
        """The row names the table's slots of the whole pages that the table has taken.

        Args:
            full: the slots that the request had there.
        """
        table, start = self._index.table, owned.owned
        slots = table.device.slots[taken]
        if self._pool.rows_name_full and np.array_equal(slots, full[: len(taken)]):
            return
        if owned.used and self._inside is not None:
            self._inside.write(row, start, slots)
        else:
            tokens = self._pool.row_tokens(slots, table.swa_device.slots[taken])
            row[start : start + len(tokens)] = tokens.to(row.dtype)

    def _give_back_lost(self, kv: "ReqKvInfo", owned: Owned, own: Own) -> None:
        """The table has not taken all that a request shared: the engine counts as left by the
        window already what was the cache's, and is the request's now."""
        assert self._inside is not None
        self._inside.wait()
        evicted = min(kv.get_evicted_seqlen(ComponentType.SWA), owned.shared)
        lost = max(0, evicted - owned.owned) // self._index.geometry.device_page
        self._pool.release_window(own.full[:lost], own.swa[:lost])
