"""SGLang's storage interface over ``storage.page_files``: the embedded default.

Stock's file backend writes pages without a checksum, so whatever is in a file of the right
length is taken for KV; it bounds the directory only if told to, and each process by itself. This
one can stand in its place under the engine's own cache too, as a ``dynamic`` backend with
``interface_v1``.
"""

import ctypes
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)

from sglang_ext.errors import StartupError
from sglang_ext.storage.file_eviction import Eviction
from sglang_ext.storage.page_directories import Share
from sglang_ext.storage.page_files import PageFiles

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolTransfer,
    )

logger = logging.getLogger(__name__)

_SETTINGS = "--hicache-storage-backend-extra-config"
_DIRECTORY_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
_DEFAULT_DIRECTORY = "/tmp/hicache"
"""As in stock."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class FileBackend(HiCacheStorage):
    """A directory of pages. Settings (``--hicache-storage-backend-extra-config``):

    ``file_storage_path`` (or SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR), ``max_size`` (or
    SGLANG_HICACHE_FILE_BACKEND_MAX_SIZE; bytes or "200G", for all that is in the directory, of
    all ranks and models; 80 % of what is free otherwise), and ``fsync`` (false).

    Args:
        identity: of the model and the layout; pages of another one are not seen.
        writers: see ``Share``.

    Raises:
        StartupError: a setting is wrong, or nothing can be written to the directory.
    """

    def __init__(
        self,
        config: "HiCacheStorageConfig",
        options: dict[str, Any] | None = None,
        *,
        identity: bytes = b"",
        writers: int = 1,
    ) -> None:
        extra = config.extra_config or {}
        given = os.environ.get(_DIRECTORY_VARIABLE)
        setting = _DIRECTORY_VARIABLE if given else f"{_SETTINGS} file_storage_path"
        base = Path(given or extra.get("file_storage_path") or _DEFAULT_DIRECTORY)
        bound = extra.get("max_size", os.environ.get("SGLANG_HICACHE_FILE_BACKEND_MAX_SIZE"))
        model = re.sub(r"[^A-Za-z0-9._-]", "-", config.model_name or "model").strip("-")[-80:]
        share = Share(base, config.tp_rank, config.tp_size, writers)
        eviction = Eviction(share, _bytes(bound))
        own = base / (f"{model}-{identity.hex()[:16]}" if identity else model) / share.own_rank
        try:
            self.files = PageFiles(
                own,
                identity + share.own_rank.encode(),
                eviction,
                fsync=bool(extra.get("fsync", False)),
            )
        except OSError as error:
            raise StartupError(
                f"{setting} {str(base)!r} cannot be used: {error}; "
                "allowed: a directory in which this user may write"
            ) from error
        self._place, self._eviction = own, eviction
        logger.info(
            "sglang-ext: pages in %s: at most %.2f GB, %.2f GB are there; %.2f GB more of other "
            "models or layouts below %s, which count and go first if they are older",
            own,
            eviction.most / 1e9,
            (eviction.held - eviction.others) / 1e9,
            eviction.others / 1e9,
            base,
        )

    def describe(self) -> str:
        """Where pages are, and the bound, for a reader."""
        return f"file, {self._place}, at most {self._eviction.most / 1e9:.2f} GB a rank"

    # ---- what is there -------------------------------------------------------

    def exists(self, key: str) -> bool:
        """See HiCacheStorage."""
        return self.files.exists(_name(key, PoolName.KV))

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: "list[PoolTransfer] | None" = None,
        extra_info: "HiCacheStorageExtraInfo | None" = None,
    ) -> PoolTransferResult:
        """See HiCacheStorage."""
        reach = self.batch_exists(keys)
        hits = {PoolName.KV: reach} if reach else {}
        stops = set(range(1, reach + 1))
        for transfer in pool_transfers or []:
            has = [self.files.exists(_name(key, transfer.name)) for key in keys[:reach]]
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or []))
                run, whole = 0, []
                for number, there in enumerate(has, start=1):
                    run = run + 1 if there else 0
                    if run >= min(window, number):
                        whole.append(number)
            else:
                whole = list(range(1, (has.index(False) if False in has else reach) + 1))
            if whole:
                hits[transfer.name] = whole[-1]
            stops.intersection_update(whole)
        return PoolTransferResult(max(stops, default=0), hits, sorted(stops))

    def use(self, keys: Sequence[str], windows: Collection[int]) -> None:
        """Pages of a path are used; see PageStore."""
        names = []
        for place, key in enumerate(keys):
            names.append(_name(key, PoolName.KV))
            if place in windows:
                names.append(_name(key, PoolName.SWA))
        self.files.use(names)

    # ---- pages by host index -------------------------------------------------

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: "HiCacheStorageExtraInfo | None" = None,
    ) -> list[bool]:
        """See HiCacheStorage."""
        return self._each(self.files.read, PoolName.KV, self.mem_pool_host, keys, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: "HiCacheStorageExtraInfo | None" = None,
    ) -> list[bool]:
        """See HiCacheStorage."""
        return self._each(self.files.write, PoolName.KV, self.mem_pool_host, keys, host_indices)

    def batch_get_v2(
        self,
        transfers: "list[PoolTransfer]",
        extra_info: "HiCacheStorageExtraInfo | None" = None,
    ) -> dict[str, list[bool]]:
        """See HiCacheStorage."""
        return self._transfers(self.files.read, transfers)

    def batch_set_v2(
        self,
        transfers: "list[PoolTransfer]",
        extra_info: "HiCacheStorageExtraInfo | None" = None,
    ) -> dict[str, list[bool]]:
        """See HiCacheStorage."""
        return self._transfers(self.files.write, transfers)

    def _transfers(self, copy: Any, transfers: "list[PoolTransfer]") -> dict[str, list[bool]]:
        return {
            t.name: self._each(
                copy, t.name, self.registered_pools[t.name], t.keys or [], t.host_indices
            )
            for t in transfers
        }

    @staticmethod
    def _each(copy: Any, pool_name: str, pool: Any, keys: list[str], indices: Any) -> list[bool]:
        if not keys:
            return []
        addresses, sizes = pool.get_page_buffer_meta(indices)
        parts = len(addresses) // len(keys)
        for number, key in enumerate(keys):
            own = slice(number * parts, (number + 1) * parts)
            buffers = [_memory(a, n) for a, n in zip(addresses[own], sizes[own], strict=True)]
            if not copy(_name(key, pool_name), buffers):
                # what follows is of no use without it
                return [True] * number + [False] * (len(keys) - number)
        return [True] * len(keys)

    # ---- pages by value ------------------------------------------------------

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """See HiCacheStorage."""
        raw = target_location.view(torch.uint8).numpy()
        ok = self.files.read(_name(key, PoolName.KV), [memoryview(raw)])
        return target_location if ok else None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """See HiCacheStorage."""
        return [self.get(key, target) for key, target in zip(keys, target_locations, strict=True)]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """See HiCacheStorage."""
        raw = value.contiguous().view(torch.uint8).numpy()
        return self.files.write(_name(key, PoolName.KV), [memoryview(raw).cast("B")])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """See HiCacheStorage."""
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def clear(self) -> None:
        """See HiCacheStorage."""
        self.files.clear()

    def remove(self) -> None:
        """Leave nothing behind: nobody will look for these pages again."""
        self.files.remove()

    def events(self) -> dict[str, int]:
        """What has happened to files, counted."""
        return {**dataclasses.asdict(self.files.counters), "removed": self.files.removed}


def _name(key: str, pool_name: str) -> str:
    return key if pool_name == PoolName.KV else f"{key}.{PoolName(pool_name).value}"


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _bytes(value: Any) -> int | None:
    """A number of bytes, or a text like "200G" or "1Gi"; None stands for none given.

    Raises:
        StartupError: it is neither.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", str(value).strip().lower())
    if match is None or match[2] == "i":
        raise StartupError(
            f"{_SETTINGS} max_size {value!r} is not allowed; "
            "use bytes, or a number with K, M, G, T or Ki, Mi, Gi, Ti"
        )
    return int(float(match[1]) * {**_UNITS, **_BINARY}[match[2]])
