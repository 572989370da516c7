"""The platform classes: CPU tensors, gloo, torch_native attention, no kernels."""

import os

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_ext_cpu import speculation


class ExtCpuPlatform(SRTPlatform):
    """Runs the unmodified engine on a plain CPU, without sgl-kernel.

    It is an out-of-tree platform rather than SGLang's own CPU one because that
    one requires the AMX operators of sgl-kernel.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """The only attention backend that is pure torch."""
        return "torch_native"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Total machine memory in bytes."""
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Machine memory in use, in bytes."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_device(self, device_id: int = 0) -> str:
        """All ranks share the one CPU device."""
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        """Nothing to select."""

    def get_device_name(self, device_id: int = 0) -> str:
        """Name shown in logs."""
        return "cpu"

    def get_device_uuid(self, device_id: int = 0) -> str:
        """A CPU has no uuid; the host name is stable and unique enough."""
        return os.uname().nodename

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """(free, total) bytes."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_torch_distributed_backend_str(self) -> str:
        """Collectives between CPU ranks."""
        return "gloo"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Which ways to draft tokens run here."""
        return algorithm in speculation.ALGORITHMS

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        """The one of the target, by the name of it that the engine takes for drafts too."""
        return backend == "triton"

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        """The same."""
        return "triton"

    def get_speculative_worker_cls(self, algorithm: str) -> None:
        """The engine's own; it is asked for before its module is imported."""
        speculation.prepare()


class ExtGpuPlatform(ExtCpuPlatform):
    """The same engine with its tensors on an NVIDIA GPU: PyTorch instead of the engine's kernels,
    but its streams, its overlapped scheduling, its pinned memory and the copies it compiles."""

    device_name = "cuda"
    device_type = "cuda"
    capabilities = PlatformCapabilities(hicache_device_kernels=True)

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Memory of the GPU in bytes."""
        return int(torch.cuda.mem_get_info(device_id)[1])

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Memory of this process on the GPU, in bytes."""
        return float(torch.cuda.max_memory_allocated(device))

    def is_pin_memory_available(self, device: object = None) -> bool:
        """Host memory can be pinned."""
        return True

    def get_device(self, device_id: int = 0) -> str:
        """One GPU for each rank."""
        return f"cuda:{device_id}"

    def set_device(self, device: torch.device) -> None:
        """Make it the current one."""
        torch.cuda.set_device(device)

    def get_device_name(self, device_id: int = 0) -> str:
        """Name shown in logs."""
        return torch.cuda.get_device_name(device_id)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """(free, total) bytes."""
        return torch.cuda.mem_get_info(device_id)

    def get_torch_distributed_backend_str(self) -> str:
        """Collectives between GPUs."""
        return "nccl"


class ExtTritonPlatform(ExtGpuPlatform):
    """The same with the engine's own Triton kernels: attention, and what else it has in Triton;
    decode steps are CUDA graphs."""

    capabilities = PlatformCapabilities(
        hicache_device_kernels=True, supports_triton=True, graph_capture=True
    )

    def get_default_attention_backend(self) -> str:
        """The one that this platform is for."""
        return "triton"

    def get_graph_runner_cls(self) -> type:
        """The engine's own for CUDA."""
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import (
            DecodeCudaGraphRunner,
        )

        return DecodeCudaGraphRunner
