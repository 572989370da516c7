"""Keys of pages in storage: a SHA-256 chain, byte for byte that of SGLang.

Each key hashes the key before it and what the positions of one device page are of, so it names a
page together with everything in front of it. See ``get_storage_hash_str`` in the engine's
``mem_cache/utils.py``; a test compares the two.
"""

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry

Key = bytes
"""32 bytes. What the engine calls the hash of a page is this in hexadecimal."""
_WIDE = b"\xff"
"""Comes before tokens of eight bytes: the number of bytes is odd then."""
_LARGEST = (1 << 32) - 1


def namespace_seed(namespace: Hashable) -> Key:
    """What the chain of a namespace begins with; empty for the namespace without a name.

    Args:
        namespace: (extra key, salt) of a request, each a text or None; or None.
    """
    if namespace is None or namespace == (None, None):
        return b""
    if not isinstance(namespace, tuple):
        raise TypeError(f"no storage keys for the namespace {namespace!r}")
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in namespace:
        if part is None:
            digest.update(b"\x00")
        else:
            text = part.encode()
            digest.update(b"\x01" + len(text).to_bytes(8, "little") + text)
    return digest.digest()


def chain(before: Key, pages: Pages, geometry: Geometry) -> list[Key]:
    """Keys of the device pages of ``pages`` (n, name_tokens), in order.

    Args:
        before: key of the device page in front of them, or the namespace's seed.
    """
    # what a position is of: its token and those behind it that its KV is of as well
    units = sliding_window_view(pages, geometry.overlap + 1, axis=1)
    tokens = units.reshape(
        len(pages) * geometry.slots_per_page, geometry.device_page * units.shape[2]
    )
    narrow = tokens.astype("<u4")
    wide = np.any(tokens > _LARGEST, axis=1).tolist()
    keys = []
    for number, row in enumerate(narrow):
        text = _WIDE + tokens[number].astype("<u8").tobytes() if wide[number] else row.tobytes()
        before = hashlib.sha256(before + text).digest()
        keys.append(before)
    return keys


def as_array(keys: Sequence[Key], per_page: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(n, per_page, 32) uint8 of keys."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, per_page, 32)
