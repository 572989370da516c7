"""CPU reference platform for SGLang (``SGLANG_PLATFORM=ext_cpu``).

Two entry points: ``activate`` names the platform class, ``install_fixes`` is a
general plugin that makes the parts of the engine work that assume CUDA or an
equal index space of the full and sliding-window pools.
"""

import os

PLATFORM_NAME = "ext_cpu"


def selected() -> bool:
    """Whether this process runs on the CPU reference platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def activate() -> str | None:
    """Platform entry point: the class to load, or None unless explicitly selected.

    Installed next to a GPU build it must never take over by itself.
    """
    return "sglang_ext_cpu.platform.ExtCpuPlatform" if selected() else None


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
        from sglang_ext_cpu import attention, host_copies, step_times

        attention.install()
        host_copies.install()
        step_times.install()
    except Exception as error:
        raise SystemExit(f"sglang-ext-cpu: cannot install the CPU fixes: {error!r}") from error
