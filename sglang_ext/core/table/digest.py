"""Chained page digests: the hash index over prefixes.

The digest of a prefix is a polynomial in its page digests,

    H(p_0 .. p_k) = seed(namespace) + sum_i mix(p_i) * B**i   (mod 2**64),

so the digests of all pages of a prompt are one cumulative sum, and a child's
digest follows from its parent's. Digests are for speed only: the index confirms
every hit by comparing tokens, so a collision costs a miss.
"""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import DIGEST_BASE

_MASK = (1 << 64) - 1
_WEIGHT_SEED = 0xD1B54A32D192ED03

Pages = NDArray[np.int64]
Digests = NDArray[np.uint64]


def mix(value: int) -> int:
    """splitmix64 finalizer (Steele et al., 2014) of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: Digests) -> Digests:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class PageHasher:
    """Digests of pages of ``page_tokens`` tokens.

    Attributes:
        weights: (page_tokens,) int64, by which the tokens of a page are multiplied.
    """

    def __init__(self, page_tokens: int) -> None:
        weights = [mix(_WEIGHT_SEED + i) | 1 for i in range(page_tokens)]
        self.weights = np.array(weights, dtype=np.uint64).view(np.int64)
        self._powers = np.ones(1, dtype=np.uint64)
        self._power_list = [1]

    def seed(self, namespace_id: int) -> int:
        """Digest of the empty prefix of a namespace."""
        return mix(~namespace_id & _MASK)

    def one(self, parent_digest: int, page: NDArray[np.int64], depth: int) -> int:
        """Digest of the page at ``depth`` (0 is the first) under ``parent_digest``."""
        self._grow(depth + 1)
        raw = int(page @ self.weights) & _MASK
        return (parent_digest + mix(raw) * self._power_list[depth]) & _MASK

    def many(self, parent_digest: int, pages: Pages, depth: int) -> Digests:
        """Digests of consecutive ``pages`` (n, page_tokens), the first at ``depth``."""
        self._grow(depth + len(pages))
        raw = (pages @ self.weights).view(np.uint64)
        terms = _mix_array(raw) * self._powers[depth : depth + len(pages)]
        return np.cumsum(terms, dtype=np.uint64) + np.uint64(parent_digest)

    def _grow(self, depth: int) -> None:
        if depth <= len(self._power_list):
            return
        size = max(depth, 2 * len(self._power_list))
        while len(self._power_list) < size:
            self._power_list.append(self._power_list[-1] * DIGEST_BASE & _MASK)
        self._powers = np.array(self._power_list, dtype=np.uint64)
