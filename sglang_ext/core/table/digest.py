"""Chained page digests: the hash index over prefixes.

The digest of a prefix is a polynomial in its page digests,

    H(p_0 .. p_k) = seed(namespace) + sum_i mix(p_i) * B**i   (mod 2**64),

so a child's digest follows from its parent's. Digests are for speed only: the index confirms
every hit by comparing tokens, so a collision costs a miss.
"""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.loop_sets import COMPILED

_MASK = (1 << 64) - 1
_WEIGHT_SEED = 0xD1B54A32D192ED03

Pages = NDArray[np.int64]


def page_weights(name_tokens: int) -> NDArray[np.int64]:
    """(name_tokens,) by which the tokens of a page's name are multiplied; odd."""
    weights = [int(COMPILED.digests.mix(_WEIGHT_SEED + i & _MASK)) | 1 for i in range(name_tokens)]
    return np.array(weights, dtype=np.uint64).view(np.int64)


def namespace_digest(root: int) -> int:
    """Digest of the empty prefix of a namespace.

    Args:
        root: parent of its first pages.
    """
    return int(COMPILED.digests.mix(~root & _MASK))
