"""The platform looks for a hooked method in no module: none has one by name."""

from tests.fixtures.zygote import Zygote

CHILD = """
from sglang.srt.plugins import hook_registry
from sglang_ext_cpu import hooked_methods
everywhere, quick = hooked_methods._everywhere, hooked_methods._of_functions

def look(original, wrapped, owner):
    kind = "method" if isinstance(owner, type) else "function"
    found = everywhere(original, wrapped, owner)
    print(kind, f"{owner.__name__}.{original.__name__}", found)
    return found

hooked_methods._of_functions = look
from sglang.srt.plugins import load_plugins
load_plugins()
assert hook_registry._propagate_patch is look
from sglang_ext.adapter import clear_answer, draft_pools, idle_calls, weight_updates
for part in (clear_answer, draft_pools, idle_calls, weight_updates):
    part.install()
idle_calls.install_in_front()

def function(): pass
hook_registry.kept_by_name = function
print("quick", quick(function, len, hook_registry.HookRegistry), hook_registry.kept_by_name is len)
print("quick", quick(function, len, hook_registry), hook_registry.kept_by_name is len)
import sglang_ext
sglang_ext.kept_by_name = function
print("quick", quick(function, len, hook_registry), sglang_ext.kept_by_name is len)
"""


def test_no_module_has_a_hooked_method_by_name(zygote: Zygote) -> None:
    """What the engine's own look finds, for every hook of a server."""
    ended = zygote.run("-c", CHILD, SGLANG_PLATFORM="ext_cpu")
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line.split() for line in ended.stdout.splitlines()]
    methods = {name: int(found) for kind, name, found in lines if kind == "method"}
    assert len(methods) > 30
    assert "Scheduler.flush_cache" in methods
    assert not {name: found for name, found in methods.items() if found}
    functions = {name: int(found) for kind, name, found in lines if kind == "function"}
    assert any(functions.values()), "functions are looked for everywhere"
    quick = [(int(found), same == "True") for kind, found, same in lines if kind == "quick"]
    assert quick == [(0, False), (0, False), (1, True)]
