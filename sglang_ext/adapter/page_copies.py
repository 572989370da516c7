"""Who moves the bytes: the engine's own copies, or the kernels of this project."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.config import COPIES
from sglang_ext.errors import StartupError
from sglang_ext.kernels.page_copy.plane import Copier, Plane, host_by_page
from sglang_ext.transfer.job import PageCopies, Part, PreparedCopies
from sglang_ext.transfer.kernel_copies import KernelCopies

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

Pool = tuple["HostKVCache", Any] | None
"""Host and device pool of layers of one shape; None for a component without layers."""


class EngineCopies:
    """PageCopies (see ``transfer.job``) by SGLang's host pools.

    Args:
        pools: all of them, in the order of their numbers.
        indices: the engine copies by token index.
        io_backend: ``--hicache-io-backend``.
        device: where its kernels want the indices.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        indices: SlotIndices,
        io_backend: str,
        device: torch.device,
    ) -> None:
        self._pools = pools
        self._indices = indices
        self._io_backend = io_backend
        self._device = device

    def prepare(self, parts: Sequence[Part]) -> PreparedCopies:
        """See PageCopies."""
        own = [part for part in parts if self._pools[part.pool] is not None]
        return _EngineJob(self, {part.pool: self._tokens(part) for part in own})

    def backup(self, pool: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy tokens to the host, all layers."""
        host_pool, device_pool = self._pool(pool)
        if self._io_backend == "kernel":
            device = self.on_device(device)
            # the staged page-first kernel walks host pages itself and wants them on the CPU
            host = host if host_pool.can_use_write_back_jit else self.on_device(host)
        host_pool.backup_from_device_all_layer(device_pool, host, device, self._io_backend)

    def load_layer(self, pool: int, layer: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy tokens to the device, one layer. Indices are where the io backend wants them."""
        host_pool, device_pool = self._pool(pool)
        host_pool.load_to_device_per_layer(
            device_pool,
            host,
            device,
            layer,
            self._io_backend,
            is_draft=layer >= host_pool.target_layer_num,
        )

    def for_loads(self, index: torch.Tensor) -> torch.Tensor:
        """Indices where the io backend wants those of a load."""
        return self.on_device(index) if self._io_backend == "kernel" else index

    def on_device(self, index: torch.Tensor) -> torch.Tensor:
        """Indices on the device."""
        return index.to(self._device, non_blocking=True)

    def _pool(self, number: int) -> tuple["HostKVCache", Any]:
        pool = self._pools[number]
        assert pool is not None, f"pool {number} has no layers"
        return pool

    def _tokens(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        return self._indices.tokens(part.host), self._indices.tokens(part.device)


class _EngineJob:
    """PreparedCopies of the engine. Indices go to the device once, not once for each layer."""

    def __init__(
        self, copies: EngineCopies, tokens: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._copies = copies
        self._tokens = tokens
        self._for_loads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def backup(self) -> None:
        for pool, (host, device) in self._tokens.items():
            self._copies.backup(pool, host, device)

    def load_layer(self, pool: int, layer: int) -> None:
        if pool not in self._tokens:
            return
        if pool not in self._for_loads:
            host, device = self._tokens[pool]
            self._for_loads[pool] = self._copies.for_loads(host), self._copies.for_loads(device)
        self._copies.load_layer(pool, layer, *self._for_loads[pool])


def planes(pool: Pool) -> list[Plane]:
    """K and V of a pool, where both are; none for a component without layers."""
    if pool is None:
        return []
    host, _ = pool
    sides = ((host.k_buffer, host.device_k_buffers), (host.v_buffer, host.device_v_buffers))
    return [
        Plane(tuple(layers), host_by_page(buffer, host.layout, host.page_size))
        for buffer, layers in sides
    ]


def chosen(kind: str | None, device: torch.device) -> str:
    """``engine`` or ``kernels``; None takes the engine's where it has copies for the device,
    which is a GPU."""
    return kind or ("kernels" if device.type == "cpu" else "engine")


def page_copies(
    kind: str | None, pools: Sequence[Pool], indices: SlotIndices, io_backend: str,
    device: torch.device,
) -> PageCopies:  # fmt: skip
    """Copies of the kind that is asked for.

    Args:
        kind: see ``chosen``.
        pools, indices, io_backend, device: see EngineCopies.
    """
    if chosen(kind, device) == "engine":
        return EngineCopies(pools, indices, io_backend, device)
    return kernel_copies([planes(pool) for pool in pools], device)


def kernel_copies(of_pools: Sequence[Sequence[Plane]], device: torch.device) -> PageCopies:
    """Copies by a kernel of this project.

    Args:
        of_pools: planes of each pool, in the order of their numbers.
        device: where the device's side is.
    """
    return KernelCopies(_copier(of_pools, device), len(of_pools))


def _copier(of_pools: Sequence[Sequence[Plane]], device: torch.device) -> Copier:
    # one imports Triton, the other has Numba compile: each where it is used
    if device.type == "cpu":
        from sglang_ext.kernels.page_copy.cpu import CpuPageCopier

        return CpuPageCopier(of_pools)
    if torch.version.hip is not None:
        # there host memory has another address on the device
        raise StartupError(f"{COPIES}=kernels is not supported on ROCm; use engine")
    from sglang_ext.kernels.page_copy.gpu import GpuPageCopier

    return GpuPageCopier(of_pools)
