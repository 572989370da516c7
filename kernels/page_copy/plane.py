"""One plane (K or V) of one component, on the device and on the host.

Layouts of the host differ in nothing but strides, so every copy is one loop nest.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pages = NDArray[np.int64]
"""Numbers of pages; a page is one of the engine's allocator."""
LAYOUTS = {
    "layer_first": ("layer", "page", "token", "head"),
    "page_first": ("page", "token", "layer", "head"),
    "page_first_direct": ("page", "layer", "token", "head"),
    "page_head": ("page", "head", "token", "layer"),
}
"""Axes of host memory, outermost first, by the engine's names (``--hicache-mem-layout``)."""
_AXES = ("page", "token", "layer", "head")


class Copier(Protocol):
    """What the kernel of a device offers; a job is whatever its ``prepare`` returns."""

    def prepare(self, pairs: Sequence[tuple[Pages, Pages]]) -> Any:
        """Get a job ready: (host pages, device pages) of each component."""
        ...

    def copy_all(self, job: Any, *, to_host: bool) -> None:
        """All components and layers."""
        ...

    def copy_layers(self, job: Any, component: int, layers: range, *, to_host: bool) -> None:
        """Some layers of one component."""
        ...


@dataclasses.dataclass(frozen=True)
class Plane:
    """Where the rows are. A row is what one layer holds of one token: (heads, width).

    Attributes:
        layers: device memory of each layer, (tokens, heads, width); a row is contiguous.
        host: host memory, (pages, page tokens, layers, heads, width) in any order of strides;
            the width is contiguous.
    """

    layers: tuple[Tensor, ...]
    host: Tensor

    def __post_init__(self) -> None:
        heads, width = self.host.shape[3:]
        assert self.host.shape[2] == len(self.layers), "as many layers on both sides"
        assert self.host.stride(4) == 1, "the width is contiguous on the host"
        for layer in self.layers:
            assert layer.dtype == self.host.dtype, "a copy does not convert"
            assert layer.shape[1:] == (heads, width), "rows of one size on both sides"
            assert layer.stride()[1:] == (width, 1), "a row is contiguous on the device"

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return int(self.host.shape[1])


def host_shape(
    layout: str, *, layers: int, pages: int, page_tokens: int, heads: int, width: int
) -> tuple[int, ...]:
    """Shape of the engine's host buffer of one plane: see ``host_by_page``."""
    axes = LAYOUTS[layout]
    sizes = {"layer": layers, "page": pages, "token": page_tokens, "head": heads}
    shape = [sizes[axis] for axis in axes]
    page = axes.index("page")
    # the engine has no axis of pages where their tokens follow upon them
    if axes.index("token") == page + 1:
        shape[page : page + 2] = [pages * page_tokens]
    return (*shape, width)


def host_by_page(buffer: Tensor, layout: str, page_tokens: int) -> Tensor:
    """The engine's host buffer of one plane as ``Plane.host``; a view.

    Args:
        buffer: (layers, tokens, heads, width) where the layout is ``layer_first``,
            (tokens, layers, heads, width) where it is ``page_first``, otherwise the axes
            that the layout names, and the width.
        layout: one of ``LAYOUTS``.
        page_tokens: tokens of a page.
    """
    axes = LAYOUTS[layout]
    if buffer.ndim == len(axes):
        buffer = buffer.unflatten(axes.index("page"), (-1, page_tokens))
    return buffer.permute(*(axes.index(axis) for axis in _AXES), len(axes))


@dataclasses.dataclass(frozen=True, slots=True)
class Strides:
    """A plane as the copies see it; sizes and strides in bytes.

    What lies together on both sides is one chunk: a head's part of a row, a row, the rows
    of a page. ``tokens`` and ``heads`` say how many chunks a page has of each layer, and are 1 for
    what has become part of the chunk.

    Attributes:
        host_page, host_token, host_layer, host_head: strides of the host.
        device_page, device_token, device_head: strides of a layer of the device.
        tokens, heads: chunks of a page and layer.
        chunk: size of a chunk.
        merges: consecutive pages lie together on both sides.
    """

    host_page: int
    host_token: int
    host_layer: int
    host_head: int
    device_page: int
    device_token: int
    device_head: int
    tokens: int
    heads: int
    chunk: int
    merges: bool

    @classmethod
    def of(cls, plane: Plane) -> "Strides":
        """Strides of a plane, with its chunks as large as they get."""
        size = plane.host.element_size()
        page, token, layer, head = (stride * size for stride in plane.host.stride()[:4])
        device_tokens = {layer.stride(0) * size for layer in plane.layers}
        assert len(device_tokens) == 1, "layers of one shape"
        device_token = device_tokens.pop()
        page_tokens, heads = plane.page_tokens, int(plane.host.shape[3])
        device_head = chunk = int(plane.host.shape[4]) * size
        tokens = page_tokens
        if heads == 1 or head == chunk:
            chunk, heads = chunk * heads, 1
        if heads == 1 and (tokens == 1 or token == device_token == chunk):
            chunk, tokens = chunk * tokens, 1
        device_page = page_tokens * device_token
        merges = tokens == heads == 1 and page == device_page == chunk
        return cls(
            page, token, layer, head, device_page, device_token, device_head,
            tokens, heads, chunk, merges,
        )  # fmt: skip

    def all_multiples_of(self, unit: int) -> bool:
        """Whether every chunk begins and ends at a multiple of ``unit`` bytes of its memory."""
        numbers = dataclasses.astuple(self)
        return all(number % unit == 0 for number in (*numbers[:7], self.chunk))
