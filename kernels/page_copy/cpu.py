"""Copies of pages by CPU threads."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sglang_ext.kernels.page_copy.cpu_loops import VECTOR, copy_pages
from sglang_ext.kernels.page_copy.plane import Pages, Plane, Strides

_PARTS = 8
"""Parts of a copy for each thread."""
_SMALLEST_PART = 1 << 20
"""Bytes; to wake a thread for less takes longer than to copy it. Measured."""


class _BoundPlane:
    """A plane as numbers for the compiled loop. The plane keeps its memory alive."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self.num_layers = len(plane.layers)
        strides = Strides.of(plane)
        self._strides = np.array(dataclasses.astuple(strides), dtype=np.int64)
        self.layer_bytes = strides.tokens * strides.heads * strides.chunk
        """What a page has of a layer."""
        self._host_layer = strides.host_layer
        self._host = plane.host.data_ptr()
        self._layers = np.array([layer.data_ptr() for layer in plane.layers], dtype=np.int64)
        aligned = all(address % VECTOR == 0 for address in (self._host, *self._layers.tolist()))
        self._streams = aligned and strides.all_multiples_of(VECTOR)

    def copy(self, host: Pages, device: Pages, layers: range, *, to_host: bool) -> None:
        start = self._host + layers.start * self._host_layer
        addresses = self._layers[layers.start : layers.stop]
        copy_pages(self._strides, start, addresses, host, device, to_host, self._streams)


class CpuPageCopier:
    """Copies pages of several components, each with one or more planes.

    Args:
        components: the planes of each component.
        threads: so many share the pages of one copy.
        smallest_part: bytes; a copy of less is not shared.
    """

    def __init__(
        self,
        components: Sequence[Sequence[Plane]],
        threads: int = 1,
        smallest_part: int = _SMALLEST_PART,
    ) -> None:
        self._components = [[_BoundPlane(plane) for plane in planes] for planes in components]
        self._threads = threads
        self._smallest_part = smallest_part
        self._others = ThreadPoolExecutor(threads - 1, "page-copy") if threads > 1 else None

    def prepare(self, pairs: Sequence[tuple[Pages, Pages]]) -> list[tuple[Pages, Pages]]:
        """Get a job ready.

        Args:
            pairs: (host pages, device pages) of each component.
        """
        return [(np.ascontiguousarray(h), np.ascontiguousarray(d)) for h, d in pairs]

    def copy_all(self, job: Sequence[tuple[Pages, Pages]], *, to_host: bool) -> None:
        """All components and layers of a job. Returns when it is done."""
        for component, planes in enumerate(self._components):
            for plane in planes:
                self._copy(plane, *job[component], range(plane.num_layers), to_host=to_host)

    def copy_layers(
        self, job: Sequence[tuple[Pages, Pages]], component: int, layers: range, *, to_host: bool
    ) -> None:
        """Some layers of one component of a job. Returns when it is done."""
        for plane in self._components[component]:
            self._copy(plane, *job[component], layers, to_host=to_host)

    def _copy(
        self, plane: "_BoundPlane", host: Pages, device: Pages, layers: range, *, to_host: bool
    ) -> None:
        if self._others is None:
            plane.copy(host, device, layers, to_host=to_host)
            return
        # in small parts, to whoever is free: threads are not equally fast
        smallest = max(self._smallest_part // (plane.layer_bytes * len(layers)), 1)
        share = max(-(-len(host) // (self._threads * _PARTS)), smallest)
        parts = [slice(start, start + share) for start in range(0, len(host), share)]
        left = iter(parts)

        def work() -> None:
            for part in left:
                plane.copy(host[part], device[part], layers, to_host=to_host)

        others = [self._others.submit(work) for _ in range(min(self._threads, len(parts)) - 1)]
        work()
        for other in others:
            # one that has not woken up by now has nothing left to do
            if not other.cancel():
                other.result()

    def close(self) -> None:
        """Release the threads."""
        if self._others is not None:
            self._others.shutdown()
