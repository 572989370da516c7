"""The engine's benchmarks import a library of data sets that nothing here uses: import them once
with a name in its place, if it is not installed."""

import importlib.util
import sys
import types

if importlib.util.find_spec("datasets") is None:
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    import sglang.benchmark.datasets  # noqa: F401

    del sys.modules["datasets"]
