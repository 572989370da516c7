"""Components of any number of planes of any width: pages are rows of bytes.

On the device a layer of a plane has one row of bytes for each page of the engine's allocator. On
the host a page of a component is one piece of memory, with the rows of all of its planes and layers
one behind the other. So the components need have nothing in common to share a memory.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sglang_ext.adapter.controller import Pools
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.host_arena import ArenaMemory
from sglang_ext.adapter.page_copies import kernel_copies
from sglang_ext.config import BACKEND, COPIES
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Plane
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import PageCopies, Schedule

_PLACEHOLDER = 256
"""Bytes: what the beginnings of pages are multiples of where they can be."""
LAYOUT = "page_first_direct"
"""The engine's name for such a host."""


@dataclasses.dataclass(frozen=True, slots=True)
class ByteLayers:
    """Layers that keep the same planes of a page.

    Attributes:
        component: its number.
        name: for a reader, and for the identity of stored pages.
        before: layer of the model before which each of them is loaded, its place in the stage.
        planes: for each plane the rows of each layer, uint8 (pages, bytes); one width a plane.
    """

    component: int
    name: str
    before: tuple[int, ...]
    planes: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a row of each plane."""
        return tuple(int(layers[0].shape[1]) for layers in self.planes)

    @property
    def page_bytes(self) -> int:
        """Of all planes and layers."""
        return len(self.before) * sum(self.widths)


def rows_by_page(buffer: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Bytes of each page of the allocator, (pages, bytes); a view.

    Args:
        buffer: (n, ...), contiguous. What is behind its last whole page belongs to none.
        rows: of the buffer that a page has.
    """
    pages = len(buffer) // rows
    return buffer[: pages * rows].view(pages, -1).view(torch.uint8)


def in_order(layers: Sequence[ByteLayers]) -> list[ByteLayers]:
    """By number of the pool, see ``transfer.job``: those of each component once, then the rest.

    Raises:
        ValueError: a component has none.
    """
    names = [pool.component for pool in layers]
    first = [names.index(component) for component in (FULL, WINDOW)]
    rest = [number for number in range(len(layers)) if number not in first]
    return [layers[number] for number in (*first, *rest)]


def sizes_of(layers: Sequence[ByteLayers]) -> tuple[int, int]:
    """Bytes of a page of each component. One of no layer has some that nobody reads, so that it
    has a place in the memory."""
    full, window = (
        sum(pool.page_bytes for pool in layers if pool.component == of) for of in (FULL, WINDOW)
    )
    return full, window or _PLACEHOLDER


class ByteHost:
    """HostKv (see ``host_kv``) of such components.

    Args:
        memory: with one plane, in which the pages of each component have as many bytes as all of
            its layers.
        layers: by number of the pool, see ``in_order``.
        model_layers: that somebody waits for.
        geometry: of the pages; a page of the table is one of the allocator.
        described: see HostKv; what the rows do not tell of themselves.
    """

    layout = LAYOUT

    def __init__(
        self,
        memory: ArenaMemory,
        layers: Sequence[ByteLayers],
        model_layers: int,
        geometry: Geometry,
        described: dict[str, Any],
    ) -> None:
        assert geometry.slots_per_page == 1, "a page of the table is one of the allocator"
        self.memory = memory
        self._layers = layers
        self._model_layers = model_layers
        self._page = geometry.device_page
        self._described = described
        self._pages = [
            memory.plane(0, (memory.arena.shape.pages(component), size), torch.uint8)
            for component, size in enumerate(sizes_of(layers))
        ]

    @property
    def of_components(self) -> Pools:
        """See HostKv."""
        full, window = (
            tuple(n for n, pool in enumerate(self._layers) if pool.component == of)
            for of in (FULL, WINDOW)
        )
        return full, window

    @property
    def schedule(self) -> Schedule:
        """See HostKv."""
        schedule: list[list[tuple[int, int]]] = [[] for _ in range(self._model_layers)]
        for number, pool in enumerate(self._layers):
            for layer, before in enumerate(pool.before):
                schedule[before].append((number, layer))
        return schedule

    @property
    def planes(self) -> list[list[Plane]]:
        """See HostKv. A page of the allocator is one token of one head here: a row is not looked
        into."""
        found: list[list[Plane]] = []
        offsets = [0, 0]
        for pool in self._layers:
            of_pool = []
            for layers, width in zip(pool.planes, pool.widths, strict=True):
                start = offsets[pool.component]
                offsets[pool.component] = stop = start + len(layers) * width
                pages = self._pages[pool.component]
                host = pages[:, start:stop].view(len(pages), 1, len(layers), 1, width)
                of_pool.append(Plane(tuple(layer.unsqueeze(1) for layer in layers), host))
            found.append(of_pool)
        return found

    def copied_by(self, kind: str | None, device: torch.device) -> str:
        """See HostKv."""
        if kind == "engine":
            raise StartupError(
                f"{COPIES}=engine is not supported for this model's KV: the engine's copies know "
                "K and V of tokens; allowed: kernels, or unset"
            )
        return "kernels"

    def copies(
        self, who: str, indices: SlotIndices, io_backend: str, device: torch.device
    ) -> PageCopies:
        """See HostKv."""
        return kernel_copies(self.planes, device)

    def described(self) -> dict[str, Any]:
        """See HostKv."""
        rows = [(pool.component, pool.name, pool.before, pool.widths) for pool in self._layers]
        return {**self._described, "rows": rows}

    def refuse_storage(self, backend: str) -> None:
        """See HostKv."""
        if backend != "file":
            raise StartupError(
                f"--hicache-storage-backend {backend} is not supported by --radix-cache-backend "
                f"{BACKEND} for this model: its pages are more than K and V; allowed: file"
            )

    def for_storage(self) -> dict[Any, Any]:
        """See HostKv."""
        from sglang.srt.mem_cache.hicache_storage import PoolName

        names = (PoolName.KV, PoolName.SWA)
        return {
            name: _StoredPages(pages, self._page)
            for name, pages in zip(names, self._pages, strict=True)
        }

    def close(self) -> None:
        """See HostKv."""
        self.memory.close()


class _StoredPages:
    """Host pages of a component, as our file backend sees them.

    Args:
        pages: (pages, bytes).
        page_size: tokens of a page.
    """

    layout = LAYOUT

    def __init__(self, pages: torch.Tensor, page_size: int) -> None:
        self.page_size = page_size
        self._pages = pages

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """For token indices of whole pages: their addresses and bytes, one piece each."""
        base, size = self._pages.data_ptr(), int(self._pages.shape[1])
        slots = (indices[:: self.page_size] // self.page_size).tolist()
        return [base + slot * size for slot in slots], [size] * len(slots)
