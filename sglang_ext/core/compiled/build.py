"""How loops are compiled: when their module is imported, and once for a machine."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: Any) -> Callable[[Function], Function]:
    """Compile a function for one signature, at once: no request waits for a compiler.

    The result is kept on disk where there is a place for it.
    """

    def decorate(function: Function) -> Function:
        try:
            return numba.njit(signature, cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(signature)(function)  # type: ignore[no-any-return]

    return decorate
