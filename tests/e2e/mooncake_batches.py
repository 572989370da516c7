"""Small pages in a Mooncake store over TCP, written and read at once as the storage tier does it.

Prints how many objects were to be moved, and how many were.
"""

import sys
from typing import Any

import numpy as np

from sglang_ext.core.storage.plan import Objects
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.storage.background import BackgroundStorage
from tests.storage.pages import objects, persist, prefetch

GEOMETRY = Geometry(1, 127)
BYTES = 8192
PAGES = 256
ROUNDS = 3


class Pages:
    """A page store over Mooncake: K and V of each slot, as SGLang's backend names them."""

    def __init__(self, client: Any) -> None:
        self.read = self.written = 0  # each by a thread of its own
        self._client = client
        self._memory = np.ones((2, PAGES * GEOMETRY.slots_per_page, BYTES), np.uint8)
        assert client.register_buffer(self._memory.ctypes.data, self._memory.nbytes) == 0

    def _parts(self, batch: Objects) -> tuple[list[str], list[int], list[int]]:
        names = [f"{key.hex()}_0_{part}" for key in batch.keys for part in "kv"]
        begins = [plane.ctypes.data for plane in self._memory]
        slots = batch.slots.reshape(-1).tolist()
        return names, [at + slot * BYTES for slot in slots for at in begins], [BYTES] * len(names)

    def load(self, component: int, batch: Objects) -> int:
        sizes = self._client.batch_get_into(*self._parts(batch))
        self.read += sizes.count(BYTES)
        return len(batch)

    def store(self, component: int, batch: Objects) -> int:
        failures = self._client.batch_put_from(*self._parts(batch))
        self.written += failures.count(0)
        return len(batch)

    def use(self, keys: object, windows: object) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    """Write, then read what was written while more is."""
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    master = f"127.0.0.1:{sys.argv[1]}"
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", master) == 0
    assert client.put("first", bytes(4096)) == 0
    store = Pages(client)
    storage = BackgroundStorage(store, GEOMETRY)  # type: ignore[arg-type]
    nothing = objects(GEOMETRY, 0, "")
    asked = 0
    for number in range(ROUNDS):
        for name, submit in (
            (number, lambda whole: storage.submit_persist(persist(whole, nothing))),
            (number - 1, lambda whole: storage.submit_prefetch(prefetch(GEOMETRY, whole, nothing))),
        ):
            if name >= 0:
                whole = objects(GEOMETRY, PAGES, str(name))
                asked += 2 * len(whole.keys)
                submit(whole)
        assert storage.drain(timeout_s=300.0)
    print("\nmoved", store.read + store.written, "of", asked, flush=True)
    storage.close()


if __name__ == "__main__":
    main()
