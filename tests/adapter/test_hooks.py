"""A hook takes effect, or its server does not start."""

import textwrap

import pytest

from tests.fixtures.zygote import Zygote

ENGINE = """
import functools, sys, types
from sglang.srt.plugins.hook_registry import HookType
from sglang_ext.adapter import hooks

class Base:
    @staticmethod
    def inherited(): return 1

class Pool(Base):
    is_full = property(lambda self: False)
    size = functools.cached_property(lambda self: 7)
    def pages(self): return 1
    @staticmethod
    def own(): return 1
    @classmethod
    def of_class(cls): return 1


engine = types.ModuleType("an_engine")
engine.Pool = Pool
sys.modules["an_engine"] = engine

def more(original, *arguments):
    return original(*arguments) + 1

def hook(name, function=more):
    hooks.apply((f"an_engine.Pool.{name}", HookType.AROUND, function))
"""


def after(zygote: Zygote, code: str) -> tuple[str, str]:
    """What this prints in a process of its own, and the last line of its errors."""
    run = zygote.run("-c", ENGINE + textwrap.dedent(code))
    return run.stdout.strip(), (run.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("name", ["pages", "own", "of_class"])
def test_a_hook_is_applied_once(zygote: Zygote, name: str) -> None:
    code = f"hook({name!r}); hook({name!r}); print(Pool().{name}())"
    assert after(zygote, code) == ("2", "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("is_full", "a property, not a function"),
        ("size", "a cached_property, not a function"),
        ("inherited", "a staticmethod, not a function"),
        ("gone", "missing"),
    ],
)
def test_what_the_engine_made_no_function_is_not_hooked(
    zygote: Zygote, name: str, kind: str
) -> None:
    """The registry would wrap a property into a method, which is true whatever it was."""
    printed, error = after(zygote, f"hook({name!r}); print('hooked')")
    assert printed == ""
    assert error.endswith(f"an_engine.Pool.{name} cannot be hooked: it is {kind} in this engine")


def test_a_hook_of_another_plugin_is_named(zygote: Zygote) -> None:
    code = """
    from sglang.srt.plugins.hook_registry import HookRegistry
    HookRegistry.register("an_engine.Pool.pages", lambda o, *a: o(*a), HookType.AROUND)
    HookRegistry.apply_hooks()
    hook("pages")
    """
    printed, error = after(zygote, code)
    assert printed == ""
    assert "an_engine.Pool.pages has been hooked by another plugin already" in error
