"""KV on the device as the engine counts it, in tokens: what can be freed, and what is locked."""

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

if TYPE_CHECKING:
    from sglang_ext.core.cache import PrefixCache
    from sglang_ext.core.table.columns import SlotColumn


class DeviceKv:
    """KV of full attention and of windows.

    Args:
        windows_alone: the model has no full-attention KV: such pages are numbers without memory.
        has_windows: it has KV of windows; otherwise those are.
    """

    def __init__(
        self, index: "PrefixCache", *, windows_alone: bool = False, has_windows: bool = True
    ) -> None:
        self.has_windows = has_windows
        self._index = index
        self._page_tokens = index.geometry.page_tokens
        self._windows_alone = windows_alone

    def evict(self, params: EvictParams) -> EvictResult:
        """Free what is short."""
        tokens, window_tokens = params.num_tokens, params.swa_num_tokens
        if self._windows_alone:  # the engine names either number
            tokens, window_tokens = 0, max(tokens, window_tokens)
        page = self._page_tokens
        pages, windows = -(-tokens // page), -(-window_tokens // page)
        freed, freed_windows = self._index.evict_device(pages, windows, abandon_backups=True)
        return EvictResult(freed * page, freed_windows * page)

    def counted(self, freed: EvictResult) -> int:
        """Tokens that the engine counts as evicted: of the component that has all of a prefix."""
        return freed.swa_num_tokens_evicted if self._windows_alone else freed.num_tokens_evicted

    def evictable(self) -> int:
        """Tokens that can be freed of that component."""
        return self._counted_column().n_evictable * self._page_tokens

    def protected(self) -> int:
        """Tokens that are locked of that component."""
        return self._counted_column().n_locked * self._page_tokens

    def full_evictable(self) -> int:
        """Tokens of full-attention KV that can be freed."""
        return 0 if self._windows_alone else self.evictable()

    def full_protected(self) -> int:
        """Tokens of full-attention KV that are locked."""
        return 0 if self._windows_alone else self.protected()

    def swa_evictable(self) -> int:
        """Tokens of sliding-window KV that can be freed."""
        return self._index.table.swa_device.n_evictable * self._page_tokens

    def swa_protected(self) -> int:
        """Tokens of sliding-window KV that are locked."""
        return self._index.table.swa_device.n_locked * self._page_tokens

    def _counted_column(self) -> "SlotColumn":
        table = self._index.table
        return table.swa_device if self._windows_alone else table.device
