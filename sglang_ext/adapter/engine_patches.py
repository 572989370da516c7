"""Which patches the engine has (``patches/`` at the top): a hook is left out where one is.

A patch adds a name to the engine that we use in place of our hook. It is there or it is not, so
no file is read at start.
"""

import dataclasses
import pkgutil
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class EnginePatch:
    """A patch as a running engine shows it.

    Attributes:
        name: of the diff.
        owner: module or class that it adds a name to.
        attribute: that name.
    """

    name: str
    owner: str
    attribute: str

    def find(self) -> Any | None:
        """What the patch has added, None in an engine without it. Imports the module."""
        return getattr(pkgutil.resolve_name(self.owner), self.attribute, None)


ATTENTION = EnginePatch(
    "0001-torch-native-translates-swa-reads",
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
    "translates_swa_reads",
)
"""Looked for by the CPU platform, which is a distribution of its own."""
SWA_MEMORY = EnginePatch(
    "0002-step3p-keeps-swa-memory",
    "sglang.srt.arg_groups.overrides",
    "RADIX_BACKENDS_WITH_SWA_HOST_TIER",
)
HOST_ALLOCATOR = EnginePatch(
    "0003-host-pools-take-an-allocator",
    "sglang.srt.mem_cache.pool_host.common",
    "host_tensors_from",
)
RESOLVED_OPTIONS = EnginePatch(
    "0004-plugins-see-resolved-options",
    "sglang.srt.server_args",
    "RESOLUTION_STEPS",
)
KNOWN = (ATTENTION, SWA_MEMORY, HOST_ALLOCATOR, RESOLVED_OPTIONS)


def applied() -> list[str]:
    """Names of the patches that the running engine has."""
    return [patch.name for patch in KNOWN if patch.find() is not None]
