"""The loops of the core as Python executes them, in the process that also runs them compiled.

Machine code wraps around where Python raises, and reads what lies behind an array. A bug that is
seeded into one of these functions is reached by all the others; what is compiled calls what it was
compiled with.
"""

import builtins
import dataclasses
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher
from numba.core.types import Number

from sglang_ext.core.compiled import arrays
from sglang_ext.core.compiled.build import WRAP_AROUND
from sglang_ext.core.compiled.loop_sets import COMPILED, Loops


def interpreted() -> Loops:
    """A set of its own: what is patched in it is patched nowhere else."""
    # a table is its arrays, so there is nothing to make of it
    written: dict[Any, Any] = {arrays.columns: lambda table: table}
    # in an order in which none takes names from a later one
    names = [field.name for field in dataclasses.fields(COMPILED) if field.name != "table"]
    modules = {name: _written(getattr(COMPILED, name), written) for name in names}
    modules["paths"].prefetch = lambda address: None  # type: ignore[attr-defined]
    return Loops(**modules, table=lambda columns, addresses: columns)


def _written(module: ModuleType, written: dict[Any, Any]) -> ModuleType:
    """A module with the functions that those of another one were compiled from.

    Args:
        written: those of the modules that it takes names from; its own are added.
    """
    copy = ModuleType(f"{__name__}.{module.__name__.rpartition('.')[2]}")
    names = vars(copy)
    names["__builtins__"] = builtins
    for name, value in vars(module).items():
        if isinstance(value, Dispatcher) and value not in written:
            source = value.py_func
            function = FunctionType(source.__code__, names, name)
            wraps = source.__code__ in WRAP_AROUND
            written[value] = np.errstate(over="ignore")(function) if wraps else function
        if isinstance(value, Number):
            value = np.dtype(value.name).type  # what it makes of a number, in less time
        if not name.startswith("__"):
            names[name] = written.get(value, value) if isinstance(value, Dispatcher) else value
    return copy


INTERPRETED = interpreted()
