"""What the engine's keys and handles are in the table."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_ext.adapter.handles import Prefix
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import Page, pages_of

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from sglang_ext.adapter.inside import InsidePages
    from sglang_ext.core.cache import PrefixCache


class Keys:
    """Prompts are pages, prefixes are paths.

    Attributes:
        root: handle of the empty prefix.
    """

    def __init__(self, index: "PrefixCache", inside: "InsidePages | None") -> None:
        self.root = Prefix(np.empty(0, dtype=np.int64), 0)
        self._index = index
        self._inside = inside
        self._geometry = geometry = index.geometry
        self._page_tokens, self._overlap = geometry.page_tokens, geometry.overlap
        self._page_type = np.dtype((np.int64, (geometry.page_tokens,)))
        self._no_pages = np.empty((0, geometry.name_tokens), dtype=np.int64)

    def of(self, key: "RadixKey") -> tuple[Pages, Hashable, Page | None]:
        """(whole pages, namespace, what is behind them if requests may resume there)."""
        token_ids, length = key.token_ids, len(key.token_ids)
        if key.limit is not None:
            length = min(length, key.limit)
        rest = None if self._inside is None else self._inside.rest(token_ids, length)
        return self.pages(token_ids, length), (key.extra_key, key.cache_salt), rest

    def pages(self, token_ids: Any, length: int) -> Pages:
        """The whole pages that the first ``length`` tokens name; a view where possible."""
        count = (length - self._overlap) // self._page_tokens
        if count <= 0:
            return self._no_pages
        if self._overlap:
            return pages_of(token_ids, count, self._geometry)
        # the same, in a quarter of the time: a match of a short prompt is mostly calls
        return np.frombuffer(token_ids, self._page_type, count)

    def prefix(self, rows: Rows, cut: int = 0) -> Prefix:
        """Handle of a path without the last ``cut`` tokens."""
        if len(rows) == 0:
            return self.root
        return Prefix(rows, self._index.table.generation.item(rows.item(-1)), cut)

    def is_current(self, node: Prefix) -> bool:
        """Whether a prefix that is not empty has not been evicted."""
        return self._index.table.is_current(int(node.rows[-1]), node.generation)
