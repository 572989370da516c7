"""Speculative decoding: what the engine has kernels for, on a server that drafts.

The engine builds and verifies its trees of draft tokens, and finds the slots of their KV, with
kernels for CUDA or with operators of its own CPU platform. For a third platform (XPU) it has Triton
versions of the same. Those are selected here; on a CPU Triton's interpreter runs them, a
millisecond or a few for each. Then the drafts' attention backends are ``torch_native`` too.

All of it is set where a server that drafts makes its draft worker. Other servers are as they were.
"""

import sys
import types
from typing import Any

from sglang_ext_cpu import draft_chains, on_gpu
from sglang_ext_cpu.model_attention import AHEAD

ALGORITHMS = frozenset({"DFLASH", "EAGLE", "EAGLE3", "FROZEN_KV_MTP", "STANDALONE"})
"""Those that the engine asks its platform about and that run here; NGRAM it does not ask about."""


def prepare() -> None:
    """Make this process ready for a draft worker, whose module has not been imported yet.

    Raises:
        SystemExit: Triton was imported without its interpreter, and there is no GPU.
    """
    _select_triton()
    _serve_drafts()
    draft_chains.install()
    if not on_gpu():
        _share_memory()


def _select_triton() -> None:
    """Flags that the modules read at each call, and that only the code of drafts looks at."""
    _import_without_operators()
    from sglang.kernels.ops.speculative import cache_locs, reconstruct_tree, spec_tree
    from sglang.srt.speculative import eagle_utils, multi_layer_eagle_worker_v2

    kernel = type(spec_tree.verify_tree_greedy_kernel_triton)
    if not (on_gpu() or kernel.__module__ == "triton.runtime.interpreter"):
        raise SystemExit("speculative decoding on a CPU: start the server with TRITON_INTERPRET=1")
    # in the last one it means that samples are the likeliest tokens, as on the engine's own CPU:
    # there is no kernel that samples from a tree
    for module in (cache_locs, reconstruct_tree, spec_tree, eagle_utils):
        module._is_xpu = True
    # asks nobody whether the platform has graphs
    multi_layer_eagle_worker_v2._is_cpu = True


def _share_memory() -> None:
    """Let a tensor be told of a stream that reads it: there is one order of work on a CPU, and
    nobody takes its memory before. PyTorch knows that for accelerators alone."""
    import torch

    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]


def _import_without_operators() -> None:
    """Import the one module that asks for compiled operators when it is imported, with an empty
    module in their place; its Triton version needs none."""
    name = "sglang.kernels.ops.speculative.reconstruct_tree"
    if name in sys.modules:
        return
    package, operators = types.ModuleType("sgl_kernel"), types.ModuleType("sgl_kernel.speculative")
    operators.reconstruct_indices_from_tree_mask = None  # type: ignore[attr-defined]
    stand_ins = {"sgl_kernel": package, "sgl_kernel.speculative": operators}
    sys.modules.update(stand_ins)
    try:
        __import__(name)
    finally:
        for stand_in in stand_ins:
            del sys.modules[stand_in]


class _Steps:
    """The backends of the steps of a chain of drafts, behind the first draft."""

    def __init__(self, backends: list[Any]) -> None:
        self.attn_backends = backends
        for drafts, backend in enumerate(backends, start=1):
            setattr(backend, AHEAD, drafts)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing to prepare."""


def _serve_drafts() -> None:
    """Let ``torch_native`` compute the attention of draft models."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    def one_of(factory: Any) -> tuple[str, Any]:
        return "torch_native", TorchNativeAttnBackend(factory.draft_model_runner)

    def steps_of(factory: Any) -> tuple[str, Any]:
        if factory.topk != 1:
            raise SystemExit(
                f"--speculative-eagle-topk {factory.topk} is not supported on this platform; "
                "allowed: 1"
            )
        count = factory.speculative_num_steps - 1
        backends = [TorchNativeAttnBackend(factory.draft_model_runner) for _ in range(count)]
        return "torch_native", _Steps(backends)

    create = DraftBackendFactory._create_backend

    def create_backend(factory: Any, name: str, makers: Any, *args: Any, **kwargs: Any) -> Any:
        # of the names that this platform's backend has, the factory knows one
        both = {**makers, "torch_native": makers["triton"]}
        return create(factory, name, both, *args, **kwargs)

    DraftBackendFactory._create_triton_prefill_backend = one_of
    DraftBackendFactory._create_triton_decode_backend = steps_of
    DraftBackendFactory._create_backend = create_backend
