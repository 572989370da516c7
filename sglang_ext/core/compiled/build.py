"""How loops are compiled: when their module is imported, and once for a machine.

Numba keeps machine code on disk as long as the file of a function is the same. It does not see
that the function calls one of another file, or uses a constant from there. So what is kept has
a stamp in its name: of that file and of all files of this folder. Loops may use names from this
folder, and none from elsewhere in the package.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

WRAP_AROUND: set[CodeType] = set()
"""Functions that count modulo 2**64 on purpose; Python warns of that."""


def compiled(
    signature: Any, *, nogil: bool = False, wraps: bool = False, inline: bool = False
) -> Callable[[Function], Function]:
    """Compile a function for one signature, at once: no request waits for a compiler.

    The result is kept on disk where there is a place for it.

    Args:
        signature: types of the arguments and of the result.
        nogil: other threads run Python meanwhile.
        wraps: see ``WRAP_AROUND``.
        inline: as if it were written where it is called, for what is called for each row: many
            arrays as arguments take longer than what most loops do with a row.
    """

    def decorate(function: Function) -> Function:
        if wraps:
            WRAP_AROUND.add(function.__code__)
        # the names of files on disk come from this one
        function.__qualname__ += f"_{_stamp(function.__code__.co_filename)}"
        try:
            where = "always" if inline else "never"
            return numba.njit(signature, cache=True, nogil=nogil, inline=where)(function)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(signature, nogil=nogil)(function)  # type: ignore[no-any-return]

    return decorate


@functools.cache
def _stamp(file: str) -> str:
    """Stands for the contents of the files that a loop in ``file`` is compiled from."""
    contents = hashlib.blake2b(digest_size=8)
    for source in (Path(file), *sorted(Path(__file__).parent.glob("*.py"))):
        if source.exists():
            contents.update(source.read_bytes())
    return contents.hexdigest()
