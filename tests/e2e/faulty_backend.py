"""Our file backend with seeded trouble; loaded by the engine as a ``dynamic`` backend."""

import random
import time
from typing import Any

from sglang_ext.adapter.file_backend import FileBackend


class FaultyBackend(FileBackend):
    """Each call goes wrong in one way or another with some chance.

    A page that could not be read leaves rubbish in its slots, as a short read does.
    """

    def __init__(self, config: Any, options: Any = None) -> None:
        super().__init__(config, options, identity=b"faulty")
        self._rng = random.Random(f"{config.extra_config['seed']}/{config.tp_rank}")

    def _trouble(self) -> bool:
        """Be slow, hang, raise, or tell that a page is lost."""
        chance = self._rng.random()
        if chance < 0.02:
            time.sleep(3.0)
        elif chance < 0.3:
            time.sleep(self._rng.uniform(0.0, 0.1))
        elif chance < 0.35:
            raise OSError("made up")
        return chance > 0.9

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """See HiCacheStorage."""
        found = super().batch_exists(keys, extra_info)
        return self._rng.randint(0, found) if self._trouble() else found

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        return self._spoil(
            super().batch_get_v1(keys, host_indices), self.mem_pool_host, host_indices
        )

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        results = super().batch_get_v2(transfers)
        return {
            t.name: self._spoil(results[t.name], self.registered_pools[t.name], t.host_indices)
            for t in transfers
        }

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        if self._trouble():  # a full disk
            return [False] * len(keys)
        return super().batch_set_v1(keys, host_indices)

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        """See HiCacheStorage."""
        if self._trouble():
            return {t.name: [False] * len(t.keys) for t in transfers}
        return super().batch_set_v2(transfers)

    def _spoil(self, results: list[bool], pool: Any, indices: Any) -> list[bool]:
        if not self._trouble():
            return results
        lost = self._rng.randrange(len(results))
        for page in range(lost, len(results)):
            start = int(indices[page * pool.page_size])
            rubbish = pool.get_dummy_flat_data_page()
            rubbish[:] = 7.0
            pool.set_from_flat_data_page(start, rubbish)
        return [*results[:lost], *[False] * (len(results) - lost)]


class FailsOnOneRank(FileBackend):
    """The second rank cannot even look at it: no start error, but whatever the system says."""

    def __init__(self, config: Any, options: Any = None) -> None:
        super().__init__(config, options, identity=b"fails")
        self._rank = config.tp_rank

    def __getattribute__(self, name: str) -> Any:
        if name == "_backend" and object.__getattribute__(self, "_rank") == 1:
            raise PermissionError("made up")
        return super().__getattribute__(name)
