"""How loops are compiled: when their module is imported, and once for a machine."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: Any, *, nogil: bool = False) -> Callable[[Function], Function]:
    """Compile a function for one signature, at once: no request waits for a compiler.

    The result is kept on disk where there is a place for it.

    Args:
        signature: types of the arguments and of the result.
        nogil: other threads run Python meanwhile.
    """

    def decorate(function: Function) -> Function:
        try:
            return numba.njit(signature, cache=True, nogil=nogil)(function)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(signature, nogil=nogil)(function)  # type: ignore[no-any-return]

    return decorate
