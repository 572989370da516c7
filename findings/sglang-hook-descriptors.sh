#!/usr/bin/env bash
# SGLang 0.5.23, hooks of plug-ins (`HookRegistry`): what is hooked is wrapped as if it were a plain
# function of its class. What is not one changes its meaning, and nothing is logged.
#
# - A property, cached or not, becomes a method: `if pool.is_full` is true from then on.
# - A static method that a class inherits gets `self` through an object, and fails; one that the
#   class has itself is kept as it is.
# - An AFTER hook on a coroutine function gets the coroutine, before any of it has run.
# - An AFTER hook cannot make a result None: None means "as it was".
# - A function with `lru_cache` loses `cache_clear`, and a table of functions keeps the old one.
#
# Seen on Linux x86-64, Python 3.11. The registry's file runs alone, on a small module.
set -euo pipefail
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
cat > "$folder/engine.py" <<'PYTHON'
import functools


class Base:
    @staticmethod
    def inherited(tokens):
        return tokens // 64


class Pool(Base):
    @property
    def is_full(self):
        return False

    @functools.cached_property
    def size(self):
        return 7

    @staticmethod
    def own(tokens):
        return tokens // 64

    async def load(self):
        return "loaded"

    def victim(self):
        return 5


@functools.lru_cache
def settings():
    return 1


TABLE = {"settings": settings}
PYTHON
cat > "$folder/hooks.py" <<'PYTHON'
import asyncio
import importlib.util
from pathlib import Path

import engine

root = Path(importlib.util.find_spec("sglang").origin).parent
spec = importlib.util.spec_from_file_location("registry", root / "srt/plugins/hook_registry.py")
registry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registry)
around, after = registry.HookType.AROUND, registry.HookType.AFTER


def unchanged(original, *args, **kwargs):
    return original(*args, **kwargs)


def say(result, *_):
    print("AFTER on a coroutine function gets a", type(result).__name__)


for name in ("Pool.is_full", "Pool.size", "Pool.own", "Pool.inherited", "settings"):
    registry.HookRegistry.register(f"engine.{name}", unchanged, around)
registry.HookRegistry.register("engine.Pool.load", say, after)
registry.HookRegistry.register("engine.Pool.victim", lambda *_: None, after)
registry.HookRegistry.apply_hooks()


def attempt(call):
    try:
        return call()
    except (AttributeError, TypeError) as error:
        return type(error).__name__


pool = engine.Pool()
print("is_full, a property that is False:", bool(pool.is_full))
print("size, a cached property:", type(pool.size).__name__)
print("own static method:", attempt(lambda: pool.own(128)))
print("inherited static method:", attempt(lambda: pool.inherited(128)))
asyncio.run(pool.load())
print("AFTER returns None for 5:", pool.victim())
print("cache_clear:", attempt(lambda: engine.settings.cache_clear()))
print("the table has the new function:", engine.TABLE["settings"] is engine.settings)
PYTHON
PYTHONPATH="$folder" "$folder/venv/bin/python" "$folder/hooks.py" 2> "$folder/log" \
  | tee "$folder/seen"
test ! -s "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'TEXT'
is_full, a property that is False: True
size, a cached property: method
own static method: 2
inherited static method: TypeError
AFTER on a coroutine function gets a coroutine
AFTER returns None for 5: 5
cache_clear: AttributeError
the table has the new function: False
TEXT
diff "$folder/expected" "$folder/seen"
echo "as described"
