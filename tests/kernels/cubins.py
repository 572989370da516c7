"""A child process of test_copies: the GPU kernel compiled for GPUs that are not here.

Prints a line for each: architecture, word, tile, direction, the axis along which the lanes that
copy are neighbours, bytes of the cubin.
"""

import itertools
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_ext.kernels.page_copy import gpu_kernel

WORDS = ((tl.int64, 8), (tl.int32, 4), (tl.int16, 2), (tl.int8, 1))
TILES = ((4, 256), (1, 1024))


def main() -> None:
    """Every variant for the architectures that are named."""
    variants = itertools.product(map(int, sys.argv[1:]), WORDS, TILES, (True, False))
    for architecture, (word, size), (rows, columns), to_host in variants:
        constants = {
            "SEGMENTS": 4,
            "FIELDS": gpu_kernel.FIELDS,
            "WORD": word,
            "WORD_BYTES": size,
            "ROWS": rows,
            "COLUMNS": columns,
            "TO_HOST": to_host,
        }
        numbers = dict.fromkeys(("component", "first_layer", "num_layers"), "i32")
        source = ASTSource(
            fn=gpu_kernel.copy_pages,
            signature={"table": "*i64", "job": "*i64"}
            | numbers
            | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
        )
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 8})
        axis = _lane_axis(compiled.asm["ttgir"])
        print(architecture, size, rows, columns, to_host, axis, len(compiled.asm["cubin"]))


def _lane_axis(text: str) -> str:
    """Of the tiles that are stored: 1 is along the words of a chunk, which lie together."""
    (layout,) = set(re.findall(r"tt\.store .*, (#\w+)>", text))
    found = re.search(rf"^{layout} = .*order = \[(\d)", text, re.MULTILINE)
    assert found is not None, layout
    return found[1]


if __name__ == "__main__":
    main()
