"""Whether the engine can ever admit a request that resumes at a given point.

The engine admits a request when its sliding-window budget (mem_cache/prefill_budget.py,
``SWAPrefillBudget.check_prefill``) says that it fits, and if it never fits the whole
pool, with a smaller chunk. But the request's own device prefix is locked while it is
judged, and that is not part of "never": with a small pool a request can wait for ever on
an idle server. A cache must not offer what cannot be taken.
"""

import dataclasses
import sys

from sglang_ext.core.plan import PrefixMatch


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """The engine's rule for sliding-window tokens.

    Attributes:
        pool: tokens of the sliding-window pool.
        window: tokens the engine keeps behind a sequence.
        page: tokens of a device page.
        chunk: largest prefill of one step, None without chunking.
    """

    pool: int
    window: int
    page: int
    chunk: int | None

    def is_possible(self, extend: int, max_new: int, locked: int, pinned: int) -> bool:
        """Whether a request is admitted when nothing else runs.

        Args:
            extend: tokens to prefill.
            max_new: tokens it may still generate.
            locked: sliding-window tokens of its device prefix, locked meanwhile.
            pinned: sliding-window tokens that its load is said to take.
        """
        extend = self._whole_pages(extend)
        step = extend if self.chunk is None else min(extend, self.chunk)
        fixed = self.page + self._whole_pages(pinned)
        need = max(step - self.window, 0) + min(extend + max_new, self.window) + fixed
        left = self.pool // self.page * self.page - locked
        if need < left:
            return True
        shrunk = (left - min(max_new, self.window) - fixed) // self.page
        return self.chunk is not None and need >= self.pool and shrunk > 0

    def possible_part(
        self, match: PrefixMatch, locked: int, length: int, max_new: int, page: int
    ) -> PrefixMatch:
        """A match, or the best part of it with which a request is admitted: without the load, or
        nothing at all.

        Args:
            locked, max_new: see ``is_possible``.
            length: tokens of the prompt.
            page: tokens of a page of the table.
        """
        extend = length - len(match.rows) * page + match.cut
        if self.is_possible(extend, max_new, locked, match.window_pages_to_pin * page):
            return match
        on_device = match.rows[: match.device_pages]
        cut = match.cut if len(on_device) == len(match.rows) else 0
        extend = length - len(on_device) * page + cut
        if self.is_possible(extend, max_new, locked, 0):
            return PrefixMatch(on_device, len(on_device), 0, cut=cut)
        return PrefixMatch(match.rows[:0], 0, 0)

    def surely_up_to(self, kept: int) -> int:
        """Tokens of a prompt that is admitted whatever is locked and pinned for it, and however
        many tokens it may generate.

        Args:
            kept: most sliding-window tokens that are locked, or pinned, for one request.
        """
        others = self.window + self.page + self._whole_pages(kept) + kept
        left = self.pool // self.page * self.page - others
        if self.chunk is not None and self.chunk < left:
            return sys.maxsize
        return left - self.page  # a prefill is rounded up to whole pages

    def _whole_pages(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page
