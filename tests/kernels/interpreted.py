"""A child process of test_copies: the GPU kernel in Triton's interpreter, in the shapes that meet
all pairs of layout, page, widths and data type.

Triton is imported anew: it decides then what it makes of a kernel.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from sglang_ext.kernels.page_copy import reference
from sglang_ext.tools import gpu_check
from tests.fixtures.pairwise import cover

ALL = reference.cases


def few(pages: Sequence[int]) -> Iterator[reference.Case]:
    """Of all cases those that have every pair."""
    matrix = [
        tuple(getattr(case, field.name) for field in dataclasses.fields(case))
        for case in ALL(pages)
    ]
    return (reference.Case(*cell) for cell in cover(matrix))


if __name__ == "__main__":
    reference.cases = few
    raise SystemExit(gpu_check.main(["--interpret"]))
