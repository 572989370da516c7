"""``sglang-ext bench``: the benchmarks, which belong to a checkout and not to the package."""

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import sglang_ext
from sglang_ext.arguments import Parser

_PACKAGE = "launch.bench"


def main(arguments: Sequence[str]) -> int:
    """Exit status of the benchmark; 1 where there are none; 2: there is none of that name."""
    # a console script does not look where it is called
    sys.path.append(str(Path(sglang_ext.__file__).parents[1]))
    if importlib.util.find_spec(_PACKAGE.partition(".")[0]) is None:
        print("sglang-ext bench: runs in a checkout of the repository only", file=sys.stderr)
        return 1
    (folder,) = importlib.import_module(_PACKAGE).__path__
    files = sorted(Path(folder).glob("*.py"))
    names = [file.stem for file in files if '__name__ == "__main__"' in file.read_text()]
    parser = Parser(prog="sglang-ext bench", description="Run a benchmark of this checkout.")
    parser.add_argument("name", choices=names, help="and its own options, with --help")
    name = parser.parse_args(arguments[:1]).name
    sys.argv = [f"{_PACKAGE}.{name}", *arguments[1:]]
    runpy.run_module(f"{_PACKAGE}.{name}", run_name="__main__", alter_sys=True)
    return 0
