"""What every kernel does, in PyTorch; and whether one does it, byte by byte, in every layout."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_ext.kernels.page_copy.plane import (
    LAYOUTS,
    Copier,
    Pages,
    Plane,
    host_by_page,
    host_shape,
)

DEVICE_PAGES, HOST_PAGES = 8, 10
"""The last one of each stays as it is, whatever is copied."""
Pairs = tuple[tuple[Pages, Pages], ...]
_NONE: Pages = np.empty(0, dtype=np.int64)
BOTH: Pairs = (
    (np.array([3, 4, 5, 7, 8, 6, 0]), np.array([1, 2, 3, 4, 0, 5, 6])),
    (np.array([8, 0]), np.array([0, 6])),
)
"""(host pages, device pages) of each of two components: runs on both sides, on the host's alone
and on the device's alone, and single ones."""
WINDOWS: Pairs = ((_NONE, _NONE), BOTH[1])
"""The first component has nothing to copy, as in most loads of a window."""
SCENARIOS = ((BOTH, None), (BOTH, 0), (BOTH, 1), (WINDOWS, None), (WINDOWS, 0))
"""Pairs, and the one component of which a layer is copied; None: all of all."""
_COMPONENTS = ((3, 2), (2, 1))
"""(layers, heads) of each component."""


def reference_copy(
    plane: Plane, host_pages: Tensor, device_pages: Tensor, layers: range, *, to_host: bool
) -> None:
    """What every kernel does, in PyTorch: page ``device_pages[i]`` to or from
    ``host_pages[i]``, of these layers."""
    for number in layers:
        layer = plane.layers[number]
        whole = len(layer) // plane.page_tokens * plane.page_tokens
        device = layer[:whole].unflatten(0, (-1, plane.page_tokens))
        host = plane.host[:, :, number]
        if to_host:
            host[host_pages] = device[device_pages].to(host.device)
        else:
            device[device_pages] = host[host_pages].to(device.device)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Memory of one shape.

    Attributes:
        layout: of the host.
        page_tokens: tokens of a page.
        widths: elements that a head has in each plane: of K and of V, as a rule.
        dtype: of all of them.
    """

    layout: str
    page_tokens: int
    widths: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        widths = " ".join(map(str, self.widths))
        return f"{self.layout} page {self.page_tokens} planes {widths} {name}"


def cases(pages: Sequence[int] = (1, 16, 64)) -> Iterator[Case]:
    """All layouts and data types, rows of odd sizes, K and V of different widths."""
    widths = ((8, 8), (3, 5), (64, 32))
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    for layout, page, planes, dtype in itertools.product(LAYOUTS, pages, widths, dtypes):
        yield Case(layout, page, planes, dtype)


def many_planes(pages: Sequence[int] = (1, 16, 64)) -> Iterator[Case]:
    """A component is any number of planes of any width: K and V, those of a draft model, and what
    an indexer keeps of each token."""
    for layout, page in itertools.product(LAYOUTS, pages):
        yield Case(layout, page, (64, 32, 16, 3, 1), torch.bfloat16)


class Memory:
    """Planes of two components with random bytes.

    Args:
        case: their shape.
        device: where the device's side is. Host memory is pinned if that is a GPU.
        seed: of the contents.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self._case = case
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        self.components = [
            [self._plane(layers, heads, width) for width in case.widths]
            for layers, heads in _COMPONENTS
        ]

    def _plane(self, layers: int, heads: int, width: int) -> Plane:
        page, layout = self._case.page_tokens, self._case.layout
        host = self._bytes(
            *host_shape(
                layout, layers=layers, pages=HOST_PAGES, page_tokens=page, heads=heads, width=width
            )
        )
        if self._device.type == "cuda":
            host = host.pin_memory()
        tokens = (DEVICE_PAGES * page, heads, width)
        on_device = tuple(self._bytes(*tokens).to(self._device) for _ in range(layers))
        return Plane(on_device, host_by_page(host, layout, page))

    def _bytes(self, *shape: int) -> Tensor:
        size = self._case.dtype.itemsize
        raw = torch.randint(
            256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=self._generator
        )
        return raw.view(self._case.dtype)

    def contents(self) -> list[Tensor]:
        """Every byte, for a comparison."""
        planes = [plane for planes in self.components for plane in planes]
        return [
            tensor.contiguous().view(torch.uint8).cpu().clone()
            for plane in planes
            for tensor in (*plane.layers, plane.host)
        ]


def differences(case: Case, device: torch.device, make: Any) -> list[str]:
    """What a kernel does differently from the reference, and what it touches besides.

    Args:
        case: shape of the memory.
        device: where the device's side is.
        make: builds the copier from the planes of each component.
    """
    found = []
    for seed, (to_host, scenario) in enumerate(itertools.product((True, False), SCENARIOS)):
        pairs, component = scenario
        # other bytes on both sides: a copy of what is there already would go unnoticed
        memory, expected = Memory(case, device, seed), Memory(case, device, seed)
        copier: Copier = make(memory.components)
        job = copier.prepare(pairs)
        layers = range(1, 2)
        if component is None:
            copier.copy_all(job, to_host=to_host)
        else:
            copier.copy_layers(job, component, layers, to_host=to_host)
        _expect(expected, pairs, component, layers, to_host=to_host)
        both = zip(memory.contents(), expected.contents(), strict=True)
        if not all(torch.equal(got, wanted) for got, wanted in both):
            scope = "everything" if component is None else f"a layer of component {component}"
            found.append(f"{case}: {scope} {'to' if to_host else 'from'} the host")
    return found


def _expect(
    memory: Memory, pairs: Pairs, component: int | None, layers: range, *, to_host: bool
) -> None:
    for number, (planes, pair) in enumerate(zip(memory.components, pairs, strict=True)):
        if component not in (None, number):
            continue
        host, device = (torch.from_numpy(pages) for pages in pair)
        for plane in planes:
            # bytes, as PyTorch has no indexed copies of fp8
            as_bytes = Plane(
                tuple(layer.view(torch.uint8) for layer in plane.layers),
                plane.host.view(torch.uint8),
            )
            wanted = range(len(plane.layers)) if component is None else layers
            reference_copy(as_bytes, host, device, wanted, to_host=to_host)
