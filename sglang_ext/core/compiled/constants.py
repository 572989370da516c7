"""Values that are compiled into the loops, for everybody who reads what the loops write.

They are here because of what is kept on disk: it is compiled again when a file of this folder
changes, and for no other reason (see ``build``).
"""

FREE = -1
"""Parent of a row that is not in use."""
NO_REQUEST = -1
ABSENT = -1
"""Slot of a page that has no copy."""
EMPTY_BUCKET = (1 << 64) - 1
LRU, LFU, SLRU, PRIORITY, LEARNED, TLRU, SESSIONS = range(7)
"""Eviction policies, see ``eviction_policy``."""
PAD = -(1 << 62) - 1
"""Fills the page of a tail up; no token equals it. Odd: products of even numbers are small in
the digests of pages."""
MAX_COUNT = (1 << 31) - 1
"""Requests and forks of a page are counted up to this."""
LEFT_THE_PATH = 2
"""Requests fewer on the next page that make a page a place where prefixes diverge."""
DIGEST_BASE = 0x9E3779B97F4A7C15
"""A page counts with its depth as a power of this in a digest, see ``digest``. Odd: no power of it
is even."""

# ---- ages: what is larger is evicted later ------------------------------------------
# From the lowest bit: what is left of the largest depth, a tick, and the rank that the
# eviction policy gives the page.

TICK_SHIFT = 22
RANK_SHIFT = 50
MAX_DEPTH = (1 << TICK_SHIFT) - 1
"""Pages before the last one that a prefix can have."""
MAX_TICK = (1 << (RANK_SHIFT - TICK_SHIFT)) - 1
MAX_RANK = (1 << 11) - 1
UNUSED_BAND = -(1 << 62)
"""Offset of the ages of window pages that no request resumes from."""
INSIDE_BAND = -(1 << 61)
"""The same for windows inside a prompt that are kept for who branches off there: they go
after the former and before every window from which a conversation goes on."""
