"""A rank whose storage is a directory: the tier, the backend and the files are the real ones,
the engine and its host pools are not."""

import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.file_backend import FileBackend
from sglang_ext.adapter.storage_backend import EnginePageStore
from sglang_ext.adapter.storage_tier import Patience, StorageTier
from sglang_ext.core.storage.keys import chain
from sglang_ext.core.storage.plan import StorageLimits
from sglang_ext.storage.background import BackgroundStorage
from tests.core.storage_ranks import GEOMETRY, PAGE, rank

WINDOW_PAGES = 2
PAGE_BYTES = 936
FILE_BYTES = 64 + PAGE_BYTES
SLOTS = 1000


class HostPool:
    """Memory of host pages, as the engine's pools show it to a backend."""

    page_size = PAGE

    def __init__(self) -> None:
        self._memory = np.zeros((SLOTS, PAGE_BYTES), dtype=np.uint8)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and sizes of pages."""
        base = self._memory.ctypes.data
        slots = (indices[::PAGE] // PAGE).tolist()
        return [base + slot * PAGE_BYTES for slot in slots], [PAGE_BYTES] * len(slots)


def backend(
    base: Path,
    identity: bytes = b"m" * 16,
    rank: int = 0,
    ranks: int = 1,
    *,
    writers: int = 1,
    **settings: Any,
) -> FileBackend:
    """The file backend of a rank."""
    extra = {"file_storage_path": str(base), **settings}
    config: Any = types.SimpleNamespace(
        extra_config=extra, model_name="model", tp_rank=rank, tp_size=ranks
    )
    made = FileBackend(config, identity=identity, writers=writers)
    pools = {PoolName.KV: HostPool(), PoolName.SWA: HostPool()}
    made.register_mem_pool_host(pools[PoolName.KV])
    for name, pool in pools.items():
        made.register_mem_host_pool_v2(pool, name)
    return made


def keys(prompt: np.ndarray) -> list[bytes]:
    """Of the whole pages of a prompt."""
    return chain(b"", prompt[: len(prompt) // PAGE * PAGE].reshape(-1, PAGE), GEOMETRY)


class Rank:
    """Serves prompts, and writes what it has computed."""

    def __init__(self, files: FileBackend, **sizes: Any) -> None:
        pages = dict.fromkeys(
            ("device_pages", "device_window_pages", "host_pages", "host_window_pages"), 400
        )
        self.engine = rank(**{**pages, "storage_threshold": 0, **sizes})
        geometry = self.engine.geometry
        self.files = files
        pools = {PoolName.KV: files.mem_pool_host, PoolName.SWA: files.mem_pool_host}
        self.store = EnginePageStore(files, pools, SlotIndices(geometry))
        self.storage = BackgroundStorage(self.store, geometry)
        limits = StorageLimits.for_host(400, 1, 16)
        patience = Patience("wait_complete", 1000.0, 1000.0)
        self.tier = StorageTier(self.engine.index, self.storage, limits, patience)

    def serve(self, prompt: np.ndarray) -> None:
        """One request, until all of it is written, or storage has refused it; whatever it has
        refused before is tried again."""
        self.engine.index.attachment.paused_until = 0
        request = self.engine.start(prompt)
        while not request.done:
            self.engine.compute(request, 5 * PAGE)
            self.engine.settle()
            self.step()
        self.engine.finish(request)
        self.engine.settle()
        self.step()
        while self.engine.index.persists.writing:
            self.step()
        self.engine.check()

    def step(self) -> None:
        """A step of the scheduler; storage is fast."""
        assert self.storage.drain(60.0)
        self.tier.commit(self.tier.report())

    def reach(self, prompt: np.ndarray) -> int:
        """Pages of a prompt that are stored, from the first one on."""
        return self.files.batch_exists([key.hex() for key in keys(prompt)])

    def resume(self, prompt: np.ndarray) -> int:
        """Pages after which a prompt can be resumed from storage."""
        return max(self.store.resume_points(keys(prompt), WINDOW_PAGES), default=0)


def age(paths: Sequence[Path], seconds: float) -> None:
    """Make files look as if they had been used so much earlier."""
    for path in paths:
        stat = path.stat()
        earlier = stat.st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(earlier, earlier))
