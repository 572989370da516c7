"""The map from digests to rows: open addressing, linear probing. See ``table.digest``.

A bucket is half a digest and a row: a search looks at digests, which are all over the memory, only
where that half is the same.
"""

from numba.core.types import int64, uint64, void

from sglang_ext.core.compiled.arrays import DIGESTS, LONGS, PAGES
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.constants import DIGEST_BASE, EMPTY_BUCKET

_MIX_1, _MIX_2, _MIX_3 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HALF = (1 << 32) - 1


@compiled(uint64(uint64), wraps=True)
def mix(value):
    """splitmix64 finalizer (Steele et al., 2014) of a 64-bit integer."""
    value += uint64(_MIX_1)
    value = (value ^ (value >> uint64(30))) * uint64(_MIX_2)
    value = (value ^ (value >> uint64(27))) * uint64(_MIX_3)
    return value ^ (value >> uint64(31))


@compiled(uint64(uint64), wraps=True)
def power(exponent):
    """``DIGEST_BASE`` to a power, modulo 2**64."""
    result, factor = uint64(1), uint64(DIGEST_BASE)
    while exponent:
        if exponent & uint64(1):
            result *= factor
        factor *= factor
        exponent >>= uint64(1)
    return result


@compiled(uint64(PAGES, int64, LONGS), wraps=True)
def page_digest(pages, number, weights):
    """What one page adds to a digest, before the power of its depth."""
    total = int64(0)
    for k in range(weights.size):
        total += pages[number, k] * weights[k]
    return mix(uint64(total))


@compiled(uint64(uint64))
def half(digest):
    """What a bucket keeps of a digest, and where the search for it begins."""
    return (digest ^ (digest >> uint64(32))) & uint64(_HALF)


@compiled(int64(DIGESTS, DIGESTS, uint64))
def find(buckets, digests, digest):
    """Row with a digest, -1 if none."""
    mask = uint64(buckets.size - 1)
    wanted = half(digest)
    i = wanted & mask
    while buckets[i] != uint64(EMPTY_BUCKET):
        if buckets[i] >> uint64(32) == wanted:
            row = int64(buckets[i] & uint64(_HALF))
            if digests[row] == digest:
                return row
        i = (i + uint64(1)) & mask
    return int64(-1)


@compiled(void(DIGESTS, uint64, int64))
def remember(buckets, digest, row):
    """Add a row with a digest that no other row has."""
    mask = uint64(buckets.size - 1)
    i = half(digest) & mask
    while buckets[i] != uint64(EMPTY_BUCKET):
        i = (i + uint64(1)) & mask
    buckets[i] = (half(digest) << uint64(32)) | uint64(row)


@compiled(void(DIGESTS, uint64, int64), wraps=True)
def forget(buckets, digest, row):
    """Take a row out, and close the gap."""
    mask = uint64(buckets.size - 1)
    i = half(digest) & mask
    while int64(buckets[i] & uint64(_HALF)) != row:
        i = (i + uint64(1)) & mask
    j = i
    while True:
        j = (j + uint64(1)) & mask
        if buckets[j] == uint64(EMPTY_BUCKET):
            break
        home = (buckets[j] >> uint64(32)) & mask
        # what lies at j may move to i if its search passes i
        if ((j - home) & mask) >= ((j - i) & mask):
            buckets[i] = buckets[j]
            i = j
    buckets[i] = uint64(EMPTY_BUCKET)
