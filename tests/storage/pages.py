"""Pages that storage writes and reads, made without a table."""

import hashlib

import numpy as np

from sglang_ext.core.storage.plan import Held, Objects, Persist, Prefetch, Stage
from sglang_ext.core.table.geometry import Geometry


def objects(geometry: Geometry, pages: int, name: str) -> Objects:
    """So many pages in host slots from 0 on, whose keys nothing of another name has."""
    slots = np.arange(pages * geometry.slots_per_page, dtype=np.int32)
    keys = [hashlib.sha256(f"{name} {slot}".encode()).digest() for slot in slots]
    return Objects(keys, slots.reshape(pages, geometry.slots_per_page))


def persist(full: Objects, window: Objects) -> Persist:
    """The write of a prompt from its first page on."""
    nothing = Held(np.zeros(0, np.int32), np.zeros(0, np.int32))
    return Persist(0, full, window, full.keys, 0, frozenset(), nothing, nothing, nothing)


def prefetch(geometry: Geometry, full: Objects, window: Objects) -> Prefetch:
    """The read of a prompt from its first page on, in one stage."""
    pages = np.zeros((len(full), geometry.page_tokens), np.int64)
    read = Prefetch(1, pages, None, 0, 0, 0, [], full.keys, len(full))
    read.reserve((len(full),), 0, (Stage(full, window),), done=True)
    return read
