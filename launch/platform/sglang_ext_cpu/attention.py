"""Fix of torch_native attention for hybrid sliding-window pools.

The backend writes K and V of a sliding-window layer to translated slots, but
reads them with the untranslated full-pool slots of ``req_to_token``. That gives
wrong tokens as soon as the two pools hand out different indices, and an
IndexError when the sliding-window pool is the smaller one. The fix translates
the row on the read side too.
"""

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_READERS = ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode")


class _SwaRows:
    """``req_to_token`` seen by a sliding-window layer.

    Positions outside the window have no sliding-window slot and read the padding
    slot 0; the attention mask hides them.
    """

    def __init__(self, rows: torch.Tensor, full_to_swa: torch.Tensor) -> None:
        self._rows = rows
        self._full_to_swa = full_to_swa

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._full_to_swa[self._rows[index]]


def _translate_swa_rows(
    original: Any,
    backend: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    rows: Any = req_to_token
    if backend.use_sliding_window_kv_pool:
        pool = backend.token_to_kv_pool
        swa_buffers = {buffer.data_ptr() for buffer in pool.swa_kv_pool.k_buffer}
        if k_cache.data_ptr() in swa_buffers:
            rows = _SwaRows(req_to_token, pool.full_to_swa_index_mapping)
    return original(backend, query, output, k_cache, v_cache, rows, *args, **kwargs)


def install() -> None:
    """Register the read-side translation on both torch_native readers.

    Not on an engine that translates reads by itself: one with the patch of that name.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if getattr(TorchNativeAttnBackend, "translates_swa_reads", False):
        return
    for name in _READERS:
        HookRegistry.register(f"{_BACKEND}.{name}", _translate_swa_rows, HookType.AROUND)
