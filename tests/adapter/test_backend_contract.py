"""The contract of storage backends: ours keep it, and backends with a fault do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName

from sglang_ext.adapter.file_backend import FileBackend
from sglang_ext.testing.backend_contract import BackendContract
from tests.adapter.memory_backend import PLACES, MemoryBackend


class TestFiles(BackendContract):
    """Our file backend."""

    most_pages = 40

    def open(self, place: Path, config: HiCacheStorageConfig, identity: bytes) -> HiCacheStorage:
        config.extra_config = {"file_storage_path": str(place), **(config.extra_config or {})}
        return FileBackend(config, identity=identity)

    def limited(self) -> dict[str, Any]:
        return {"max_size": self.most_pages * 1000}


class Memory(BackendContract):
    """A backend in memory, with or without a fault."""

    backend = MemoryBackend

    def open(self, place: Path, config: HiCacheStorageConfig, identity: bytes) -> HiCacheStorage:
        return self.backend(place, f"{identity.hex()}/{config.tp_rank}")

    def damage(self, place: Path, backend: HiCacheStorage) -> None:
        pages = PLACES[place]
        for name, (text, mark) in list(pages.items()):
            pages[name] = bytes([text[0] ^ 1]) + text[1:], mark


class TestMemory(Memory):
    """The one of the tests."""


class Swaps(MemoryBackend):
    """K and V change places."""

    def read(self, pool: str, key: str) -> bytes | None:
        text = super().read(pool, key)
        return None if text is None else text[1:] + text[:1]


class MixesPools(MemoryBackend):
    """A window has the name of its full-attention page."""

    def name(self, pool: str, key: str) -> tuple[str, str]:
        return self.owner, key


class ForgetsWhoseItIs(MemoryBackend):
    """One name for all models."""

    def name(self, pool: str, key: str) -> tuple[str, str]:
        return self.owner.rpartition("/")[2], f"{pool}/{key}"


class SharesRanks(MemoryBackend):
    """One name for all ranks."""

    def name(self, pool: str, key: str) -> tuple[str, str]:
        return self.owner.partition("/")[0], f"{pool}/{key}"


class BelievesWhatItReads(MemoryBackend):
    """No checksum."""

    def read(self, pool: str, key: str) -> bytes | None:
        found = self.pages.get(self.name(pool, key))
        return None if found is None else found[0]


class ClaimsAll(MemoryBackend):
    """A page that is missing counts as read."""

    def load(self, pool: str, keys: list[str], indices: torch.Tensor) -> list[bool]:
        super().load(pool, keys, indices)
        return [True] * len(keys)


class StopsForNothing(MemoryBackend):
    """A missing page ends the batch as if nothing had been read."""

    def load(self, pool: str, keys: list[str], indices: torch.Tensor) -> list[bool]:
        done = super().load(pool, keys, indices)
        return done if all(done) else [False] * len(done)


class Raises(MemoryBackend):
    """A missing page is an error."""

    def read(self, pool: str, key: str) -> bytes | None:
        if self.name(pool, key) not in self.pages:
            raise KeyError(key)
        return super().read(pool, key)


class IgnoresWindows(MemoryBackend):
    """Any page is a resume point."""

    def has_window(self, key: str) -> bool:
        return True


class SeesNoWindow(MemoryBackend):
    """No page is one."""

    def has_window(self, key: str) -> bool:
        return False


class RefusesAgain(MemoryBackend):
    """A page that is there is not written."""

    def write(self, pool: str, key: str, text: bytes) -> bool:
        return self.name(pool, key) not in self.pages and super().write(pool, key, text)


class KeepsDamage(MemoryBackend):
    """A page that is there is left alone, whatever it has."""

    def write(self, pool: str, key: str, text: bytes) -> bool:
        return self.name(pool, key) in self.pages or super().write(pool, key, text)


class Appends(MemoryBackend):
    """A page that is written again grows."""

    def write(self, pool: str, key: str, text: bytes) -> bool:
        return super().write(pool, key, text + (self.read(pool, key) or b""))

    def read(self, pool: str, key: str) -> bytes | None:
        text = super().read(pool, key)
        return None if text is None else text[-len(text) // 2 :] + text[: len(text) // 2]


class WritesLessThanItSays(MemoryBackend):
    """A full disk that nobody is told of."""

    def write(self, pool: str, key: str, text: bytes) -> bool:
        return len(self.pages) >= 30 or super().write(pool, key, text)


class LivesInItsProcess(MemoryBackend):
    """A restart finds nothing."""

    def __init__(self, place: Any, owner: str) -> None:
        super().__init__(place, owner)
        self.pages = {}


class ClearsHalf(MemoryBackend):
    """Windows stay."""

    def clear(self) -> None:
        for name in [name for name in self.pages if name[1].startswith(PoolName.KV.value)]:
            del self.pages[name]


class WritesBeside(MemoryBackend):
    """The slot behind the last page gets something, too."""

    def load(self, pool: str, keys: list[str], indices: torch.Tensor) -> list[bool]:
        done = super().load(pool, keys, indices)
        if len(indices):
            host = self.registered_pools[pool]
            host.memory[int(indices[-1]) // host.page_size + 1] = 0
        return done


FAULTS = [
    *(Swaps, MixesPools, ForgetsWhoseItIs, SharesRanks, BelievesWhatItReads, ClaimsAll),
    *(StopsForNothing, Raises, IgnoresWindows, SeesNoWindow, RefusesAgain, KeepsDamage),
    *(Appends, WritesLessThanItSays, LivesInItsProcess, ClearsHalf, WritesBeside),
]


def failing(contract: BackendContract, place: Path) -> Iterator[str]:
    """Tests of the contract that a backend does not pass."""
    for name in dir(BackendContract):
        if name.startswith("test_"):
            own = place / name
            own.mkdir()
            try:
                getattr(contract, name)(own)
            except (AssertionError, KeyError):
                yield name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_backend_with_a_fault_is_found(fault: type[MemoryBackend], tmp_path: Path) -> None:
    contract = Memory()
    contract.backend = fault
    assert list(failing(contract, tmp_path))


def test_a_backend_that_promises_no_restart_is_held_to_it(tmp_path: Path) -> None:
    contract = Memory()
    contract.survives_restart = False
    assert list(failing(contract, tmp_path)) == ["test_a_restart_finds_what_was_written"]
