"""A storage backend in memory: the least that the contract asks for."""

import ctypes
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

Pages = dict[tuple[str, str], tuple[bytes, int]]
"""By owner and name: what a page has, and its checksum."""
PLACES: dict[Any, Pages] = defaultdict(dict)
"""What lives as long as a server elsewhere would."""


class MemoryBackend(HiCacheStorage):
    """Pages of all ranks and models in one dictionary.

    Attributes:
        pages: that dictionary.
    """

    def __init__(self, place: Any, owner: str) -> None:
        self.pages = PLACES[place]
        self.owner = owner
        self.lock = threading.Lock()

    def name(self, pool: str, key: str) -> tuple[str, str]:
        """What a page is stored under."""
        return self.owner, f"{pool}/{key}"

    def read(self, pool: str, key: str) -> bytes | None:
        """A page; None if it is not there, or damaged."""
        text, mark = self.pages.get(self.name(pool, key), (b"", -1))
        return text if zlib.crc32(text) == mark else None

    def write(self, pool: str, key: str, text: bytes) -> bool:
        """Keep a page; whether it is kept."""
        with self.lock:
            self.pages[self.name(pool, key)] = text, zlib.crc32(text)
        return True

    def _buffers(self, pool: str, keys: list[str], indices: torch.Tensor) -> Iterator[list[Any]]:
        addresses, sizes = self.registered_pools[pool].get_page_buffer_meta(indices)
        parts = len(addresses) // max(1, len(keys))
        for number in range(len(keys)):
            own = slice(number * parts, (number + 1) * parts)
            pairs = zip(addresses[own], sizes[own], strict=True)
            yield [(ctypes.c_char * size).from_address(address) for address, size in pairs]

    def load(self, pool: str, keys: list[str], indices: torch.Tensor) -> list[bool]:
        """Read pages into host memory."""
        done = []
        for key, parts in zip(keys, self._buffers(pool, keys, indices), strict=True):
            text = self.read(pool, key)
            done.append(text is not None)
            for part in parts if text is not None else ():
                part.raw, text = text[: len(part)], text[len(part) :]
        return done

    def save(self, pool: str, keys: list[str], indices: torch.Tensor) -> list[bool]:
        """Write pages from host memory."""
        buffers = self._buffers(pool, keys, indices)
        return [
            self.write(pool, key, b"".join(part.raw for part in parts))
            for key, parts in zip(keys, buffers, strict=True)
        ]

    def exists(self, key: str) -> bool:
        """See HiCacheStorage."""
        return self.name(PoolName.KV, key) in self.pages

    def has_window(self, key: str) -> bool:
        """Whether a window page is there."""
        return self.name(PoolName.SWA, key) in self.pages

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """See HiCacheStorage."""
        reach = self.batch_exists(keys)
        (trailing,) = pool_transfers
        assert trailing.hit_policy == PoolHitPolicy.TRAILING_PAGES
        window = len(trailing.keys)
        has = [self.has_window(key) for key in keys[:reach]]
        stops = [s for s in range(1, reach + 1) if all(has[max(0, s - window) : s])]
        return PoolTransferResult(max(stops, default=0), {PoolName.KV: reach}, stops)

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        return self.load(PoolName.KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        return self.save(PoolName.KV, keys, host_indices)

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        return {t.name: self.load(t.name, t.keys, t.host_indices) for t in transfers}

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        return {t.name: self.save(t.name, t.keys, t.host_indices) for t in transfers}

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """See HiCacheStorage; pages go by index."""
        raise NotImplementedError

    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        """See HiCacheStorage; pages go by index."""
        raise NotImplementedError

    def set(self, key: str, value: Any = None, *where: Any) -> bool:
        """See HiCacheStorage; pages go by index."""
        raise NotImplementedError

    def batch_set(self, keys: Any, values: Any = None, *where: Any) -> bool:
        """See HiCacheStorage; pages go by index."""
        raise NotImplementedError

    def clear(self) -> None:
        """See HiCacheStorage; of this rank and model."""
        with self.lock:
            for name in [name for name in self.pages if name[0] == self.owner]:
                del self.pages[name]
