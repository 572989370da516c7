"""The engine's own copies between GPU and host, on the reference platform.

Its host pools compile them with nvcc where they find one, but only on a platform that is CUDA's.
Those that come compiled (``sgl_kernel``) stay missing: there are copies for the layouts
``layer_first`` and ``page_first``, with the io backend ``kernel``.
"""

import importlib

_TARGET = "sglang.srt.mem_cache.pool_host.mha"


def install() -> None:
    """Have the host pools compile their copies."""
    pool_module = importlib.import_module(_TARGET)
    pool_module._is_cuda = True  # type: ignore[attr-defined]
