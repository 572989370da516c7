"""CPU versions of the ``sgl_kernel.kvcacheio`` copies that SGLang's host pools call.

``MHATokenToKVPoolHost`` binds these names only on CUDA, ROCm and XPU. With CPU
versions in their place the stock host tier, and ours, run every layout and both
io backends on a CPU. "Device" tensors are then CPU tensors too.

Names and argument meaning follow the calls in SGLang 0.5.23
``mem_cache/pool_host/mha.py``: ``lf`` layer first, ``pf`` page first, ``ph`` page
head; indices count tokens. Host shapes, for K or V alone:
layer_first (L, tokens, H, D); page_first (tokens, L, H, D);
page_first_direct (pages, L, page, H, D); page_head (pages, H, page, L, D).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TARGET = "sglang.srt.mem_cache.pool_host.mha"


def _rows_at(address: int, rows: int, row_bytes: int) -> Tensor:
    """Byte view (rows, row_bytes) of foreign memory; the caller keeps it alive."""
    raw = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(rows, row_bytes)


def _copy_rows(dst: Tensor, dst_index: Tensor, src: Tensor, src_index: Tensor) -> None:
    dst[dst_index] = src[src_index].view(-1, *dst.shape[1:])


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Layer first on both sides, any number of layers."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        _copy_rows(dst, dst_indices, src, src_indices)


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Host page_first_direct to one device layer, for K and V."""
    pages, offsets = src_indices // page_size, src_indices % page_size
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[dst_indices] = src[pages, layer_id, offsets]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """All device layers (K layers, then V layers) to host page_first_direct."""
    pages, offsets = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, src in enumerate(src_ptrs):
        dst_ptrs[i // layers][pages, i % layers, offsets] = src[src_indices]


def transfer_kv_per_layer(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
) -> None:
    """One layer, layer first on both sides."""
    _copy_rows(dst_k, dst_indices, src_k, src_indices)
    _copy_rows(dst_v, dst_indices, src_v, src_indices)


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Host page_first to one device layer."""
    dst_k[dst_indices] = src_k[src_indices, layer_id]
    dst_v[dst_indices] = src_v[src_indices, layer_id]


def transfer_kv_per_layer_ph_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    page_size: int,
    head_num: int,
) -> None:
    """Host page_head to one device layer."""
    pages, offsets = src_indices // page_size, src_indices % page_size
    dst_k[dst_indices] = src_k[pages, :, offsets, layer_id]
    dst_v[dst_indices] = src_v[pages, :, offsets, layer_id]


def _device_layers(pointers: Tensor, indices: Tensor, item_size: int) -> list[Tensor]:
    """Byte rows (tokens, item_size) behind a table of device layer addresses."""
    rows = int(indices.max()) + 1 if indices.numel() else 0
    return [_rows_at(address, rows, item_size) for address in pointers.tolist()]


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    """All layers between two tables of layer addresses, layer first on both sides."""
    for src_table, dst_table in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        sources = _device_layers(src_table, src_indices, item_size)
        targets = _device_layers(dst_table, dst_indices, item_size)
        for src, dst in zip(sources, targets, strict=True):
            dst[dst_indices] = src[src_indices]


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """All device layers to host page_first."""
    for table, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, src in enumerate(_device_layers(table, src_indices, item_size)):
            rows = src[src_indices].view(dst.dtype)
            dst[dst_indices, layer] = rows.view(-1, *dst.shape[2:])


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    page_size: int,
    head_num: int,
) -> None:
    """All device layers to host page_head."""
    pages, offsets = dst_indices // page_size, dst_indices % page_size
    for table, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, src in enumerate(_device_layers(table, src_indices, item_size)):
            rows = src[src_indices].view(dst.dtype)
            dst[pages, :, offsets, layer] = rows.view(-1, head_num, dst.shape[-1])


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """One buffer: all device layers to host page_first."""
    for layer, src in enumerate(_device_layers(src_layers, src_indices, item_size)):
        rows = src[src_indices].view(dst.dtype)
        dst[dst_indices, layer] = rows.view(-1, *dst.shape[2:])


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """One buffer: host page_first to one device layer."""
    dst[dst_indices] = src[src_indices, layer_id]


COPIES = (
    transfer_kv_all_layer_mla_lf_pf,
    transfer_kv_per_layer_mla_pf_lf,
    transfer_kv_all_layer,
    transfer_kv_all_layer_direct_lf_pf,
    transfer_kv_all_layer_lf_pf,
    transfer_kv_all_layer_lf_ph,
    transfer_kv_direct,
    transfer_kv_per_layer,
    transfer_kv_per_layer_direct_pf_lf,
    transfer_kv_per_layer_pf_lf,
    transfer_kv_per_layer_ph_lf,
)


def _plain_alloc(
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> Tensor:
    """Host buffer without cudaHostRegister: there is no device to pin it for."""
    buffer: Tensor = allocator.allocate(dims, dtype=dtype, device=device)
    return buffer


def install() -> None:
    """Put the CPU copies and the plain host allocation in place."""
    import importlib

    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    pool_module = importlib.import_module(_TARGET)
    for copy in COPIES:
        setattr(pool_module, copy.__name__, copy)
    # The table is shared by reference with every host pool module.
    ALLOC_MEMORY_FUNCS["cpu"] = _plain_alloc
