"""Layers of one shape, whose pages have one host pool: those of the target and of its drafts."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_ext.adapter.drafts import DraftLayers
from sglang_ext.config import BACKEND
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.job import Schedule

if TYPE_CHECKING:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

PLANES = 2
"""Of a stack: K and V."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Layers of one shape of a component, in one host pool: K in one plane of the host, V in the
    next.

    Attributes:
        component: its number.
        pools: of the device. The first may have any number of layers, the others have one each.
        plane: that of K.
    """

    component: int
    pools: tuple[Any, ...]
    plane: int

    def page_bytes(self, geometry: Geometry) -> tuple[int, int]:
        """Bytes of one table page: (K, V), all layers."""
        sizes = [page_bytes(pool, geometry) for pool in self.pools]
        return sum(k for k, _ in sizes), sum(v for _, v in sizes)

    @property
    def is_apart(self) -> bool:
        """Whether it has drafts alone."""
        return self.plane > 0

    @property
    def has_drafts(self) -> bool:
        """Whether it has layers of drafts."""
        return self.is_apart or len(self.pools) > 1

    @property
    def kind(self) -> str:
        """Type of the KV."""
        return str(self.pools[0].dtype)

    @property
    def layers(self) -> int:
        """How many there are."""
        return sum(int(pool.layer_num) for pool in self.pools)


def layers_by_component(pool: "SWAKVPool") -> tuple[dict[int, int], dict[int, int]]:
    """(full, sliding-window) maps of the model's layer number to the pool's."""
    full: dict[int, int] = {}
    swa: dict[int, int] = {}
    for layer, (local, is_swa) in pool.layers_mapping.items():
        (swa if is_swa else full)[layer] = local
    return full, swa


def page_bytes(pool: Any, geometry: Geometry) -> tuple[int, int]:
    """Bytes of one table page of a device pool: (K, V), all layers."""
    info = pool.get_device_pool_infos()[0].buffer_info
    rows = len(info.buffers.k) * info.head_num * info.dtype.itemsize * geometry.page_tokens
    return rows * info.head_dim, rows * info.v_head_dim


def stacks_of(target: "SWAKVPool", drafts: Sequence[DraftLayers]) -> list[Stack]:
    """Those of the target, first; then those of its drafts that are of other shapes.

    Raises:
        StartupError: drafts have more shapes than there are pools for.
    """
    if not layers_by_component(target)[FULL]:
        if drafts:
            raise StartupError(
                f"{BACKEND}: drafts with KV of their own, for a model without full-attention "
                "layers, are not supported; use --speculative-algorithm NGRAM"
            )
        return [Stack(WINDOW, (target.swa_kv_pool,), 0)]
    packed = tuple(d.pool for d in drafts if _fits_into(d, target.swa_kv_pool))
    stacks = [
        Stack(FULL, (target.full_kv_pool,), 0),
        Stack(WINDOW, (target.swa_kv_pool, *packed), 0),
    ]
    for component in (FULL, WINDOW):
        apart = [d.pool for d in drafts if d.component == component and d.pool not in packed]
        if not apart:
            continue
        first, *others = apart
        if not all(_alike(first, pool) and pool.layer_num == 1 for pool in others):
            raise StartupError(
                f"{BACKEND}: drafts of different shapes are not supported: "
                f"{', '.join(str(_shape(pool)) for pool in apart)}"
            )
        stacks.append(Stack(component, tuple(apart), PLANES * (len(stacks) - 1)))
    return stacks


def _fits_into(draft: DraftLayers, pool: Any) -> bool:
    return draft.is_packed and draft.pool.layer_num == 1 and _alike(draft.pool, pool)


def _alike(one: Any, other: Any) -> bool:
    return _shape(one) == _shape(other)


def _shape(pool: Any) -> tuple[Any, ...]:
    info = pool.get_device_pool_infos()[0].buffer_info
    return info.head_num, info.head_dim, info.v_head_dim, info.dtype


def bytes_by_plane(stacks: Sequence[Stack], geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """What a page of each component has in each plane of the host."""
    planes = PLANES * (1 + max(stack.plane for stack in stacks) // PLANES)
    sizes = {stack.component: [0] * planes for stack in stacks}
    for stack in stacks:
        sizes[stack.component][stack.plane : stack.plane + PLANES] = stack.page_bytes(geometry)
    return tuple(tuple(sizes[component]) for component in sorted(sizes))


def schedule_of(target: "SWAKVPool", stacks: Sequence[Stack]) -> Schedule:
    """What is loaded for each layer of the model. Drafts run behind it, and have nobody who waits
    for them: the first of their layers come with its first one, and all before its last."""
    schedule: list[list[tuple[int, int]]] = []
    for component, layers in enumerate(layers_by_component(target)):
        for layer, local in layers.items():
            schedule.extend([] for _ in range(layer + 1 - len(schedule)))
            schedule[layer].append((component, local))
    last = len(schedule) - 1
    for number, stack in enumerate(stacks):
        of_target = 0 if stack.is_apart else stack.pools[0].layer_num
        for depth, layer in enumerate(range(of_target, stack.layers)):
            schedule[min(depth, last)].append((number, layer))
    return schedule
