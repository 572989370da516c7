"""CPU reference platform for SGLang (``SGLANG_PLATFORM=ext_cpu``).

Two entry points: ``activate`` names the platform class, ``install_fixes`` is a
general plugin that makes the parts of the engine work that assume CUDA or an
equal index space of the full and sliding-window pools.

``EXT_CPU_DEVICE=cuda`` puts the tensors of the same platform on an NVIDIA GPU:
the engine's scheduler, CUDA streams and pinned memory, and of its CUDA kernels the
copies that it compiles. A variable, since SGLang skips the fixes of a distribution
with a second platform.

``EXT_CPU_ATTENTION=triton`` leaves the engine's own Triton attention under its name, see
``triton_attention``.
"""

import os

PLATFORM_NAME = "ext_cpu"
DEVICE = "EXT_CPU_DEVICE"
ATTENTION = "EXT_CPU_ATTENTION"


def selected() -> bool:
    """Whether this process runs on the reference platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def on_gpu() -> bool:
    """Whether its tensors are on a GPU.

    Raises:
        SystemExit: ``EXT_CPU_DEVICE`` names another device.
    """
    device = os.environ.get(DEVICE, "cpu")
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"{DEVICE}={device!r} is not allowed; use cpu or cuda")
    return device == "cuda"


def engines_triton() -> bool:
    """Whether the attention backend ``triton`` is the engine's own.

    Raises:
        SystemExit: ``EXT_CPU_ATTENTION`` names another backend.
    """
    name = os.environ.get(ATTENTION, "torch_native")
    if name not in ("torch_native", "triton"):
        raise SystemExit(f"{ATTENTION}={name!r} is not allowed; use torch_native or triton")
    return name == "triton"


def activate() -> str | None:
    """Platform entry point: the class to load, or None unless explicitly selected.

    Installed next to a GPU build it must never take over by itself. Called before
    the engine looks for CUDA.
    """
    if not selected():
        return None
    if not on_gpu():
        # schedulers inherit it; see ``speculation``
        os.environ["TRITON_INTERPRET"] = "1"
        return "sglang_ext_cpu.platform.ExtCpuPlatform"
    import torch

    # the engine takes its own kernels wherever PyTorch is built for CUDA
    torch.version.cuda = None
    if engines_triton():
        return "sglang_ext_cpu.platform.ExtTritonPlatform"
    return "sglang_ext_cpu.platform.ExtGpuPlatform"


def install_fixes() -> None:
    """General-plugin entry point. Does nothing on another platform.

    Raises:
        SystemExit: a fix could not be installed. SGLang logs and swallows every
            ``Exception`` of a plugin, and a server without the fixes would
            return wrong tokens, so the failure must not be an ``Exception``.
    """
    if not selected():
        return
    try:
        from sglang_ext_cpu import (
            attention,
            disaggregation,
            dp_attention,
            dp_controller,
            embeddings,
            gpu_copies,
            hooked_methods,
            host_copies,
            host_reserve,
            in_place,
            model_attention,
            pinned,
            proposals,
            step_times,
            triton_attention,
        )

        hooked_methods.install()
        attention.install()
        model_attention.install()
        (triton_attention if engines_triton() else model_attention).name_backend()
        in_place.install()
        embeddings.install()
        dp_attention.install_padding()
        (gpu_copies if on_gpu() else host_copies).install()
        if not on_gpu():
            _do_not_wait_for_cuda()
            _do_not_compile()
            pinned.install()
            dp_attention.install()
            dp_controller.install()
            disaggregation.install()
        host_reserve.install()
        step_times.install()
        proposals.install()
    except Exception as error:
        raise SystemExit(f"sglang-ext-cpu: cannot install the CPU fixes: {error!r}") from error


def _do_not_wait_for_cuda() -> None:
    """A build of PyTorch for CUDA names CUDA as its device even where there is none; the engine
    waits for it when memory has been released."""
    import torch

    torch.cuda.synchronize = torch.cpu.synchronize


def _do_not_compile() -> None:
    """Run what the engine compiles as it is written: that takes seconds for each function, and the
    compiler refuses a PyTorch whose ``cuda.synchronize`` is that of the CPU."""
    import torch

    torch.compiler.set_stance("force_eager")
