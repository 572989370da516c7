"""Hooks on the engine's functions, which take effect or stop the start."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.plugins.hook_registry import HookType

Hook = tuple[str, "HookType", Callable[..., Any]]
"""The engine's function, how our part goes with it, and our part."""


def apply(*hooks: Hook) -> None:
    """Hook functions of the engine, before anybody keeps them; again is no harm.

    Raises:
        StartupError: a hook did not take effect.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    for target, kind, function in hooks:
        if any(known is function for _, known, _ in HookRegistry._hooks[target]):
            continue
        if target in HookRegistry._patched:  # the registry would leave ours out without a word
            raise StartupError(
                f"{target} has been hooked by another plugin already; leave it out, with "
                "SGLANG_PLUGINS"
            )
        _require_function(target)
        HookRegistry.register(target, function, kind)
    HookRegistry.apply_hooks()
    for target, _, _ in hooks:
        if target not in HookRegistry._patched:
            raise StartupError(f"the hook on {target} did not take effect; see the log above")


def _require_function(target: str) -> None:
    """The registry wraps whatever it finds; a property becomes a method, and is true ever after.
    It keeps static methods and those of classes as they are, if they are the class's own."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, (staticmethod, classmethod)) and name in vars(owner):
        return
    if not inspect.isfunction(found):
        kind = "missing" if found is None else f"a {type(found).__name__}, not a function"
        raise StartupError(f"{target} cannot be hooked: it is {kind} in this engine")
