"""DP attention on this platform: the engine asks whether it runs on a CPU, and means its own
CPU platform, where it would pick what works here too.

These flags and functions are module globals, read at each call. Nothing else of the modules
looks at them, so they are set one by one; the engine's ``is_cpu`` stays False elsewhere.
"""

from typing import Any


def install() -> None:
    """Let collectives and padded batches do without kernels and pinned memory."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.model_executor import forward_batch_info

    # gathers and scatters of hidden states are custom operators that have kernels for
    # accelerators alone; with the flag they are gloo's
    parallel_state._is_cpu = True  # type: ignore[attr-defined]
    # the numbers of tokens of all ranks, and rows between the ranks' parts of a gathered batch:
    # pinned memory and a Triton kernel otherwise
    forward_batch_info._is_cpu = True  # type: ignore[attr-defined]
    dp_attention.memcpy_func = dp_attention.memcpy_cpu


def install_padding() -> None:
    """Let torch_native say how long a padded request is; on a CPU and on a GPU.

    Ranks pad their batches to the largest one. The backend knows no padding, for without DP
    attention it has no graphs that need it.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def one_token(_: Any) -> int:
        # a request without tokens would have a row of attention without a key: NaN
        return 1

    TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = one_token
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = one_token
