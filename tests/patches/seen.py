"""What the extension does in the engine that is on the path; prints it as JSON."""

import json
from typing import Any

import torch

from sglang_ext import config
from sglang_ext.adapter import engine_patches, setup


def _host_pools() -> dict[str, Any]:
    from sglang.srt.mem_cache.pool_host import base, common

    from sglang_ext.adapter.host_arena import tensors_from

    engines_own = base.get_allocator_from_storage
    registered: list[Any] = []
    common._cuda_host_register = lambda buffer, *_: registered.append(buffer)

    class Ours:
        def allocate(self, dims: Any, dtype: Any, device: str) -> torch.Tensor:
            tensor = torch.empty(dims, dtype=dtype, device=device)
            setattr(tensor, common._CUDA_HOST_REGISTERED_RANGES_ATTR, [])
            return tensor

    with tensors_from(None):  # type: ignore[arg-type]
        allocators = [base.get_allocator_from_storage("default") for _ in range(2)]
        replaced = base.get_allocator_from_storage is not engines_own
    common.alloc_with_host_register((4,), torch.uint8, "cpu", True, Ours())
    twice = len(registered)
    common.alloc_with_host_register((4,), torch.uint8, "cpu", True, common.HostTensorAllocator())
    return {
        "replaced": replaced,
        "allocators": sorted({type(a).__name__ for a in allocators}),
        "one each": len({id(a) for a in allocators}) == 2,
        "after": type(base.get_allocator_from_storage("default")).__name__,
        "registered again": twice,
        "registered others": len(registered) - twice,
    }


def main() -> None:
    """Load the plugins as a server does, and say what came of it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    setup.verify_hooks()
    host_pools = _host_pools()
    backends = engine_patches.SWA_MEMORY.find()
    steps = engine_patches.RESOLVED_OPTIONS.find()
    print(
        json.dumps(
            {
                "hooks": sorted(HookRegistry._patched),
                "applied": engine_patches.applied(),
                "keeps memory": backends is not None and config.BACKEND in backends,
                "steps": None if steps is None else len(steps),
                "host pools": host_pools,
            }
        )
    )


if __name__ == "__main__":
    main()
