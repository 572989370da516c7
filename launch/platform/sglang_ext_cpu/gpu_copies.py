"""The engine's own copies between GPU and host, on the reference platform.

Its host pools compile some of them with nvcc where they find one, but only on a platform that is
CUDA's: those for the layouts ``layer_first`` and ``page_first``, with the io backend ``kernel``.
The others come compiled. ``EXT_CPU_SGL_KERNEL`` names a folder with ``common_ops.abi3.so`` and
``kvcacheio.py`` of an ``sglang-kernel`` for the PyTorch that runs; without it they are missing.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

VARIABLE = "EXT_CPU_SGL_KERNEL"
_TARGET = "sglang.srt.mem_cache.pool_host.mha"


def install() -> None:
    """Have the host pools compile their copies, and give them those that are compiled."""
    pool_module: Any = importlib.import_module(_TARGET)
    pool_module._is_cuda = True
    folder = os.environ.get(VARIABLE)
    if folder is not None:
        for name, copy in _compiled(Path(folder)).items():
            setattr(pool_module, name, copy)


def _compiled(folder: Path) -> dict[str, Any]:
    """The copies of the library by name.

    Raises:
        OSError: it is not there, or does not go with this PyTorch.
    """
    import torch

    torch.ops.load_library(folder / "common_ops.abi3.so")
    source = folder / "kvcacheio.py"
    spec = importlib.util.spec_from_file_location("sgl_kernel_copies", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: copy for name, copy in vars(module).items() if name.startswith("transfer_kv_")}
