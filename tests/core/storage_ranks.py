"""Simulated ranks with a storage, and one request after another."""

from typing import Any

import numpy as np

from sglang_ext.core.table.geometry import Geometry
from sglang_ext.testing.engine import SimEngine
from sglang_ext.testing.sizes import Sizes
from sglang_ext.testing.storage import SimStore, StorageFaults

PAGE = 16
GEOMETRY = Geometry(PAGE, 2 * PAGE)
FAST = StorageFaults(mean=1e-6)


def rank(
    store: SimStore | None = None, kind: type[SimEngine] = SimEngine, **sizes: Any
) -> SimEngine:
    """A rank with a storage that is there at once."""
    defaults: dict[str, Any] = {
        "device_pages": 40,
        "device_window_pages": 40,
        "host_pages": 40,
        "host_window_pages": 40,
        "pinned_share": 1,
        "storage_threshold": 1,
        "storage_stop": 16,
    }
    return kind(GEOMETRY, Sizes(**{**defaults, **sizes}), store=store, storage_faults=FAST)


def tokens(pages: int, seed: int = 0, extra: int = 1) -> np.ndarray:
    """A prompt of so many whole pages and a little more."""
    return np.arange(pages * PAGE + extra) + 1000 * seed


def serve(
    engine: SimEngine, prompt: np.ndarray, namespace: object = None, chunk: int = 5 * PAGE
) -> None:
    """One request from its arrival to its end."""
    engine.arrive(prompt, namespace)
    for _ in range(6):
        step(engine)
    request = engine.admit(0)
    while not request.done:
        engine.compute(request, chunk)
    engine.finish(request)
    engine.settle()
    for _ in range(6):
        step(engine)
    engine.check()
    engine.check_every_slot()


def step(*engines: SimEngine) -> None:
    """A step of the scheduler on every rank."""
    for engine in engines:
        engine.pass_time(1.0)
    backups = [min(v) for v in zip(*(e.report() for e in engines), strict=True)]
    storage = [min(v) for v in zip(*(e.storage_report() for e in engines), strict=True)]
    for engine in engines:
        engine.ledger.commit(backups)
        engine.commit_storage(storage)


def match(engine: SimEngine, prompt: np.ndarray) -> int:
    """Pages with which a request can go on."""
    pages = prompt[: len(prompt) // PAGE * PAGE].reshape(-1, PAGE)
    return len(engine.index.match(pages, None).rows)
