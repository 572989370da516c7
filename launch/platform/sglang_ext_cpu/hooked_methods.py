"""A hook on a method is looked for in its class alone.

What the engine hooks it also replaces in every module that has imported it by name. For that it
looks at all names of all modules, some 170,000, once for each hook, and a start of a server has
forty of them: that was two thirds of the work of a start. Nearly all are hooks on methods, which
no module has by name; those on functions are looked for as ever.
"""

from typing import Any

from sglang.srt.plugins import hook_registry

_everywhere = hook_registry._propagate_patch


def install() -> None:
    """For all hooks that are applied later, whoever registers them."""
    hook_registry._propagate_patch = _of_functions


def _of_functions(original: Any, wrapped: Any, owner: Any) -> int:
    """How many modules had the original by name."""
    return 0 if isinstance(owner, type) else _everywhere(original, wrapped, owner)
