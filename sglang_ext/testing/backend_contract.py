"""What a storage backend has to do behind this cache, as tests to derive from.

A backend is a class of SGLang's ``HiCacheStorage``. Derive from ``BackendContract`` in a test file,
say how the backend is opened, and pytest runs every test here on it::

    class TestMine(BackendContract):
        def open(self, place, config, identity):
            return MyBackend(config, {"path": place})

The tests use it as the cache does: through ``EnginePageStore``, over host memory whose pages have
two parts, K and V. Keys name contents, so a page that is written again is the same page; a page
that cannot be read whole and right is a page that is not there.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.storage_backend import EnginePageStore
from sglang_ext.core.storage.keys import Key, chain
from sglang_ext.core.storage.plan import Objects
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.port import FULL, WINDOW

Bytes = NDArray[np.uint8]
PAGE, WINDOW_PAGES = 16, 2
SLOTS = 512
_PARTS = {FULL: (520, 416), WINDOW: (104, 96)}
"""Bytes of K and V of a page of each component."""
_GEOMETRY = Geometry(device_page=PAGE, window=WINDOW_PAGES * PAGE)
_NAMES = {FULL: PoolName.KV, WINDOW: PoolName.SWA}
_UNTOUCHED = 0xA5
_THREADS = 4


def keys(pages: int, seed: int = 0) -> list[Key]:
    """Of the pages of a prompt."""
    tokens = np.random.default_rng(seed).integers(0, 1 << 17, (pages, PAGE))
    return chain(b"", tokens, _GEOMETRY)


def contents(component: int, key: Key, rank: int = 0) -> Bytes:
    """What a page has: it follows from its key, the component and the rank."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng([seed, component, rank]).integers(
        0, 256, sum(_PARTS[component]), dtype=np.uint8
    )


class HostPages:
    """A host pool as the engine's pools show themselves to a backend, in the layout ``page_first``.

    Attributes:
        page_size: tokens of a page.
        memory: (slots, bytes of a page) uint8.
    """

    layout, page_size, device, dtype = "page_first", PAGE, "cpu", torch.uint8

    def __init__(self, component: int) -> None:
        self._parts = _PARTS[component]
        self.memory: Bytes = np.full((SLOTS, sum(self._parts)), _UNTOUCHED, dtype=np.uint8)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and sizes of K and V of each page, one after the other."""
        base, size = self.memory.ctypes.data, sum(self._parts)
        addresses, sizes = list[int](), list[int]()
        for slot in (indices[::PAGE] // PAGE).tolist():
            addresses += [base + slot * size, base + slot * size + self._parts[0]]
            sizes += self._parts
        return addresses, sizes

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A page by value."""
        return torch.from_numpy(self.memory[index // PAGE].copy())

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Room for a page by value."""
        return torch.empty(sum(self._parts), dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write a page by value."""
        self.memory[index // PAGE] = data_page.numpy()


class Rank:
    """One rank of a server with the backend.

    Attributes:
        store: the backend as the cache sees it.
    """

    def __init__(self, backend: HiCacheStorage, number: int = 0) -> None:
        self._number = number
        self._pools = {component: HostPages(component) for component in _NAMES}
        named: dict[Any, Any] = {_NAMES[c]: pool for c, pool in self._pools.items()}
        backend.register_mem_pool_host(named[PoolName.KV])
        for name, pool in named.items():
            backend.register_mem_host_pool_v2(pool, name)
        backend.on_host_pools_registered()
        self.store = EnginePageStore(backend, named, SlotIndices(_GEOMETRY))

    def write(self, component: int, own: Sequence[Key], first: int = 0) -> int:
        """Write pages from slots from ``first`` on; how many are stored."""
        memory = self._pools[component].memory
        for slot, key in enumerate(own, start=first):
            memory[slot] = contents(component, key, self._number)
        return self.store.store(component, _objects(own, first))

    def read(self, component: int, own: Sequence[Key], first: int = SLOTS // 2) -> int:
        """Read pages into slots from ``first`` on; how many are there. Those are right, and nothing
        is written anywhere else."""
        memory = self._pools[component].memory
        memory[:] = _UNTOUCHED
        found = self.store.load(component, _objects(own, first))
        assert 0 <= found <= len(own), f"{found} of {len(own)} pages were read"
        for slot, key in enumerate(own[:found], start=first):
            right = np.array_equal(memory[slot], contents(component, key, self._number))
            assert right, "a page that was read is not the one that was written"
        others = np.delete(memory, slice(first, first + len(own)), axis=0)
        assert bool((others == _UNTOUCHED).all()), "a read has written into pages of others"
        return found

    def write_prompt(self, own: Sequence[Key], windows: Iterable[int]) -> None:
        """Write all pages of a prompt, and the windows of some of them, as the cache does."""
        places = sorted(windows)
        self.store.use(own, frozenset(places))
        assert self.write(FULL, own) == len(own), "a page was not stored"
        window = [own[place] for place in places]
        assert self.write(WINDOW, window) == len(window), "a window was not stored"

    def stops(self, own: Sequence[Key]) -> list[int]:
        """Resume points of a prompt."""
        return self.store.resume_points(own, WINDOW_PAGES)


def _objects(own: Sequence[Key], first: int) -> Objects:
    return Objects(list(own), np.arange(first, first + len(own), dtype=np.int32)[:, None])


class BackendContract:
    """Tests of a backend; see the module.

    Attributes:
        survives_restart: whether pages are there when a backend is opened again in the same place.
        most_pages: with ``limited`` the backend keeps about so many full-attention pages; None if
            it has no bound of its own.
    """

    survives_restart = True
    most_pages: int | None = None

    def open(self, place: Path, config: HiCacheStorageConfig, identity: bytes) -> HiCacheStorage:
        """The backend of a rank.

        Args:
            place: an empty directory, the same one for all ranks and restarts of a test.
            config: what the engine tells a backend: its rank, the name of the model. With a bound,
                its ``extra_config`` has what ``limited`` returns.
            identity: of weights and layout: pages of another one must not be found. The cache puts
                it into ``config.model_name`` as well.
        """
        raise NotImplementedError

    def limited(self) -> dict[str, Any]:
        """Settings with which the backend keeps about ``most_pages``."""
        return {}

    def damage(self, place: Path, backend: HiCacheStorage) -> None:
        """Flip a bit in everything that is stored; by default in the middle of every file."""
        for file in [path for path in place.rglob("*") if path.is_file()]:
            text = bytearray(file.read_bytes())
            if text:
                text[len(text) // 2] ^= 1
                file.write_bytes(text)

    def start(
        self,
        place: Path,
        rank: int = 0,
        ranks: int = 1,
        identity: bytes = b"m" * 16,
        extra: dict[str, Any] | None = None,
    ) -> tuple[Rank, HiCacheStorage]:
        """A rank that has just started, and its backend."""
        config = HiCacheStorageConfig(
            tp_rank=rank,
            tp_size=ranks,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name=f"model-{identity.hex()}",
            extra_config=extra or {},
        )
        backend = self.open(place, config, identity)
        return Rank(backend, rank), backend

    # ---- pages -----------------------------------------------------------------

    def test_pages_come_back(self, tmp_path: Path) -> None:
        """Byte by byte, into other slots, and windows apart from full-attention pages."""
        rank, _ = self.start(tmp_path)
        own = keys(5)
        assert rank.write(FULL, own) == len(own)
        assert rank.read(WINDOW, own) == 0, "a window is found that was never written"
        assert rank.write(WINDOW, own[2:]) == 3
        assert rank.read(FULL, own) == len(own)
        assert rank.read(WINDOW, own[2:]) == 3
        assert rank.store.has(own[4])

    def test_many_pages_come_back(self, tmp_path: Path) -> None:
        """As many as the cache asks for at a time."""
        rank, _ = self.start(tmp_path)
        own = keys(64)
        assert rank.write(FULL, own) == rank.read(FULL, own) == len(own)

    def test_no_pages_are_no_trouble(self, tmp_path: Path) -> None:
        """The cache asks for nothing now and then."""
        rank, _ = self.start(tmp_path)
        assert rank.stops([]) == []
        assert rank.write(FULL, []) == rank.read(FULL, []) == 0
        rank.store.use([], frozenset())

    def test_what_was_never_written_is_not_there(self, tmp_path: Path) -> None:
        """Nothing is found, and nothing is raised."""
        rank, _ = self.start(tmp_path)
        own = keys(3)
        assert not rank.store.has(own[0])
        assert rank.stops(own) == []
        assert rank.read(FULL, own) == rank.read(WINDOW, own) == 0

    def test_a_missing_page_ends_what_is_read(self, tmp_path: Path) -> None:
        """What is behind it is of no use, and what is in front of it is."""
        rank, _ = self.start(tmp_path)
        own = keys(5)
        assert rank.write(FULL, own[:2]) == 2
        assert rank.write(FULL, own[3:]) == 2
        assert rank.read(FULL, own) == 2
        assert rank.read(FULL, own[3:]) == 2
        rank.write(WINDOW, own[1:2])
        assert rank.read(WINDOW, own[1:3]) == 1

    def test_a_page_that_is_written_again_is_the_same(self, tmp_path: Path) -> None:
        """It counts as stored, and its bytes stay."""
        rank, _ = self.start(tmp_path)
        own = keys(4)
        for first in (0, 17):
            assert rank.write(FULL, own, first) == len(own)
            assert rank.write(WINDOW, own, first) == len(own)
        assert rank.read(FULL, own) == rank.read(WINDOW, own) == len(own)

    # ---- where a prompt can be resumed -----------------------------------------

    def test_resume_points_need_their_window(self, tmp_path: Path) -> None:
        """All full-attention pages, and the last windows before the point or all there are."""
        rank, _ = self.start(tmp_path)
        own = keys(8)
        rank.write_prompt(own[:6], windows=(0, 2, 3, 5))
        found = rank.stops(own)
        assert found == sorted(set(found)), "resume points do not rise"
        assert set(found) <= {1, 4}, f"{found}: no window is whole there"
        assert max(found, default=0) == 4, "the deepest resume point is not found"
        assert rank.stops(own[:3]) in ([], [1])
        rank.write(FULL, own[7:])
        rank.write(WINDOW, own[6:])
        assert max(rank.stops(own), default=0) == 4, "a page in front of it is missing"

    # ---- who it belongs to -------------------------------------------------------

    def test_other_weights_find_nothing(self, tmp_path: Path) -> None:
        """The same tokens are other pages to another model."""
        own = keys(3)
        one, _ = self.start(tmp_path, identity=b"a" * 16)
        one.write_prompt(own, windows=(1, 2))
        other, _ = self.start(tmp_path, identity=b"b" * 16)
        assert not other.store.has(own[0])
        assert other.stops(own) == []
        assert other.read(FULL, own) == other.read(WINDOW, own) == 0

    def test_ranks_have_pages_of_their_own(self, tmp_path: Path) -> None:
        """Under the same keys: each has other heads of the same layers."""
        own = keys(4)
        ranks = [self.start(tmp_path, rank=rank, ranks=2)[0] for rank in (0, 1)]
        for rank in ranks:
            rank.write_prompt(own, windows=(2, 3))
        for rank in ranks:
            assert rank.read(FULL, own) == len(own)
            assert rank.read(WINDOW, own[2:]) == 2

    def test_threads_and_ranks_at_once(self, tmp_path: Path) -> None:
        """Each rank looks, reads and writes in threads of its own, two servers the same pages."""
        shared = keys(8)
        ready = threading.Barrier(_THREADS)

        def serve(number: int) -> None:
            rank, _ = self.start(tmp_path, rank=number % 2, ranks=2)
            own = keys(6, seed=1 + number)
            ready.wait(120.0)
            for _ in range(5):
                rank.write_prompt(shared, windows=(6, 7))
                rank.write_prompt(own, windows=(5,))
                assert rank.read(FULL, shared) == len(shared)
                assert rank.read(FULL, own) == len(own)
                assert 8 in rank.stops(shared)

        with ThreadPoolExecutor(_THREADS) as pool:
            for served in [pool.submit(serve, number) for number in range(_THREADS)]:
                served.result(timeout=120.0)

    # ---- what becomes of pages ---------------------------------------------------

    def test_a_restart_finds_what_was_written(self, tmp_path: Path) -> None:
        """Or nothing at all, if it does not promise to."""
        own = keys(4)
        before, _ = self.start(tmp_path)
        before.write_prompt(own, windows=(2, 3))
        before.store.close()
        after, _ = self.start(tmp_path)
        expected = len(own) if self.survives_restart else 0
        assert after.read(FULL, own) == expected
        assert max(after.stops(own), default=0) == expected

    def test_what_is_damaged_is_not_there(self, tmp_path: Path) -> None:
        """A page is good, or it is missing; and it can be written anew."""
        rank, backend = self.start(tmp_path)
        own = keys(4)
        rank.write_prompt(own, windows=(2, 3))
        self.damage(tmp_path, backend)
        for component, damaged in ((FULL, own), (WINDOW, own[2:])):
            found = sum(rank.read(component, [key]) for key in damaged)
            assert found == 0, "a page is not damaged, or it is not noticed"
        rank.write(FULL, own)
        assert rank.read(FULL, own) == len(own), "a damaged page cannot be written again"

    def test_a_bound_costs_pages_and_nothing_else(self, tmp_path: Path) -> None:
        """What is said to be there can be read, and the last prompt is among it."""
        rank, _ = self.start(tmp_path, extra=self.limited())
        most = self.most_pages or 16
        prompts = [keys(most // 4, seed=seed) for seed in range(12)]
        for own in prompts:
            rank.store.use(own, frozenset())
            stored = rank.write(FULL, own)
            assert rank.read(FULL, own[:stored]) == stored
        left = [[rank.store.has(key) for key in own] for own in prompts]
        for own, there in zip(prompts, left, strict=True):
            for key, is_there in zip(own, there, strict=True):
                assert rank.read(FULL, [key]) == is_there, "a page that is there cannot be read"
        assert all(left[-1]), "what was just written has gone"
        held = sum(map(sum, left))
        if self.most_pages is None:
            assert held == sum(map(len, prompts)), "a page has gone without a bound"
        else:
            assert held <= 1.5 * self.most_pages, "the bound is not held"

    def test_a_clear_forgets_everything(self, tmp_path: Path) -> None:
        """And it goes on."""
        rank, _ = self.start(tmp_path)
        own = keys(4)
        rank.write_prompt(own, windows=(2, 3))
        rank.store.clear()
        assert not rank.store.has(own[0])
        assert rank.stops(own) == []
        assert rank.read(FULL, own) == rank.read(WINDOW, own[2:]) == 0
        rank.write_prompt(own, windows=(2, 3))
        assert rank.read(FULL, own) == len(own)
