"""Copies of pages by a GPU kernel, between its memory and host memory that it can address."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from sglang_ext.kernels.page_copy import gpu_kernel
from sglang_ext.kernels.page_copy.plane import Pages, Plane, Strides

PROGRAMS = 32
"""Programs of a launch; each has some 8 KiB under way. So many saturate an H200's link to the host
in every layout, and leave most of the GPU to the forward pass."""
_WARPS = 8
_TILE_WORDS = 1024
"""Words that a program copies at a time."""
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class GpuPageCopier:
    """Copies pages of several components, each with one or more planes, on the current stream.

    Args:
        components: the planes of each component; host memory is registered with the device.
        programs: programs of a launch. Few leave the GPU to the forward pass.
    """

    def __init__(self, components: Sequence[Sequence[Plane]], programs: int = PROGRAMS) -> None:
        self._planes = [plane for planes in components for plane in planes]
        self._programs = programs
        self._device = self._planes[0].layers[0].device
        strides = [Strides.of(plane) for plane in self._planes]
        self.word = word_bytes(self._planes, strides)
        longest = max(each.chunk for each in strides) // self.word
        self.columns = min(triton.next_power_of_2(longest), _TILE_WORDS)
        self._table = torch.tensor(self._numbers(components, strides), dtype=torch.int64).to(
            self._device
        )

        if self._device.type == "cuda":
            self._compile([(np.empty(0, dtype=np.int64),) * 2] * len(components))

    def _compile(self, nothing: Sequence[tuple[Pages, Pages]]) -> None:
        """Both directions, so that no request waits for a compiler."""
        for to_host in (True, False):
            self.copy_all(self.prepare(nothing), to_host=to_host)
        torch.cuda.synchronize(self._device)

    def _numbers(
        self, components: Sequence[Sequence[Plane]], strides: Sequence[Strides]
    ) -> list[int]:
        owners = [number for number, planes in enumerate(components) for _ in planes]
        numbers: list[int] = []
        addresses: list[int] = []
        start = len(self._planes) * gpu_kernel.FIELDS
        for owner, plane, each in zip(owners, self._planes, strides, strict=True):
            numbers += [owner, len(plane.layers), start + len(addresses), plane.host.data_ptr()]
            numbers += [each.host_page, each.host_token, each.host_layer, each.host_head]
            numbers += [each.device_page, each.device_token, each.device_head]
            numbers += [each.tokens, each.heads, each.chunk // self.word]
            addresses += [layer.data_ptr() for layer in plane.layers]
        return numbers + addresses

    def prepare(self, pairs: Sequence[tuple[Pages, Pages]]) -> torch.Tensor:
        """Put the page numbers of a job on the device.

        Args:
            pairs: (host pages, device pages) of each component, int64.
        """
        numbers: list[int] = []
        start = 2 * len(pairs)
        for host, _ in pairs:
            numbers += [start, len(host)]
            start += 2 * len(host)
        pages = [pages for pair in pairs for pages in pair]
        job = torch.from_numpy(np.concatenate([np.array(numbers, dtype=np.int64), *pages]))
        if self._device.type == "cuda":
            job = job.pin_memory()
        return job.to(self._device, non_blocking=True)

    def copy_all(self, job: torch.Tensor, *, to_host: bool) -> None:
        """All components and layers of a job, in one launch."""
        self._launch(job, -1, range(0), to_host=to_host)

    def copy_layers(
        self, job: torch.Tensor, component: int, layers: range, *, to_host: bool
    ) -> None:
        """Some layers of one component of a job."""
        self._launch(job, component, layers, to_host=to_host)

    def _launch(self, job: torch.Tensor, component: int, layers: range, *, to_host: bool) -> None:
        kernel: Any = gpu_kernel.copy_pages
        kernel[(self._programs,)](
            self._table, job, component, layers.start, len(layers),
            SEGMENTS=len(self._planes), FIELDS=gpu_kernel.FIELDS,
            WORD=_WORDS[self.word], WORD_BYTES=self.word,
            ROWS=_TILE_WORDS // self.columns, COLUMNS=self.columns,
            TO_HOST=to_host, num_warps=_WARPS,
        )  # fmt: skip


def word_bytes(planes: Sequence[Plane], strides: Sequence[Strides]) -> int:
    """The largest word, up to 8 bytes, that every chunk begins and ends at."""
    addresses = [layer.data_ptr() for plane in planes for layer in plane.layers]
    addresses += [plane.host.data_ptr() for plane in planes]
    return max(
        word
        for word in _WORDS
        if math.gcd(*addresses) % word == 0 and all(s.all_multiples_of(word) for s in strides)
    )
