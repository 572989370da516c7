"""Sizes of pages, slots and windows, fixed for the life of a cache."""

import dataclasses

MIN_PAGE_TOKENS = 16
"""Smallest page of the table, in tokens; device pages below it are grouped."""


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Page and window sizes.

    Attributes:
        device_page: tokens in one page of the engine's allocator.
        window: tokens before a position that its sliding-window layers read, at
            least 1 (a Hugging Face ``sliding_window`` of 128 is 127 here).
        whole_pages: requests resume at the end of a table page only, also where device pages
            are smaller.
        overlap: tokens behind a position that its KV is of as well: 1 where a draft model has
            KV at each position that is of the token after it.
    """

    device_page: int
    window: int
    whole_pages: bool = False
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.device_page < 1:
            raise ValueError(f"device_page must be at least 1, got {self.device_page}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0 <= self.overlap <= self.device_page:
            raise ValueError(f"overlap must be 0 to {self.device_page}, got {self.overlap}")

    @property
    def slots_per_page(self) -> int:
        """Device (and host) slots of one table page; a slot is one device page."""
        return -(-MIN_PAGE_TOKENS // self.device_page)

    @property
    def page_tokens(self) -> int:
        """Tokens of one table page: a multiple of the device page, at least 16."""
        return self.slots_per_page * self.device_page

    @property
    def name_tokens(self) -> int:
        """Tokens that a page is named by: its own, and those that it has in common with the name
        of the next page."""
        return self.page_tokens + self.overlap

    def named(self, tokens: int) -> int:
        """Positions, of so many tokens from the first one on, whose KV is known by them."""
        return max(0, tokens - self.overlap)

    def whole_pages_in(self, tokens: int) -> int:
        """Whole pages that so many tokens from the first one on name."""
        return self.named(tokens) // self.page_tokens

    @property
    def resumes_inside(self) -> bool:
        """Whether a request may resume inside a table page, see ``core.inserts``."""
        return self.slots_per_page > 1 and not self.whole_pages

    @property
    def window_pages(self) -> int:
        """Pages of one window: what a request must have that resumes at the end of the last
        of them, or anywhere inside it, where that is possible."""
        return -(-self.window // self.page_tokens) + self.resumes_inside

    @property
    def retained_tokens(self) -> int:
        """Sliding-window tokens the engine must keep behind a running sequence.

        With table pages larger than device pages the last boundary can lie almost
        a page behind the sequence, and its whole window must still be live. Where the last
        positions are not named yet, it lies as many further behind.
        """
        if self.slots_per_page == 1:
            return self.window + self.overlap
        return (self.window_pages + 1) * self.page_tokens
