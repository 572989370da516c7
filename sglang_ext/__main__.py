"""``sglang-ext``, or this package as a module: tools beside the engine.

A tool is imported when it is called, and by the tool what it needs.
"""

import importlib
import sys
from collections.abc import Sequence

from sglang_ext import __version__
from sglang_ext.arguments import Parser

TOOLS = {
    "doctor": ("sglang_ext.doctor.cli", "what is wrong here, and what to do about it"),
    "plan": ("sglang_ext.planning.cli", "what fits, from a launch line and a model"),
    "size": ("sglang_ext.sizing.cli", "how much host memory is worth it, by replay of traffic"),
    "status": ("sglang_ext.tools.status", "tiers, hit rates and retention of a running server"),
    "cache": ("sglang_ext.tools.cache", "look up, pin, drop and preload prompts of a server"),
    "report": ("sglang_ext.tools.report.cli", "a page about a server or a benchmark, as one file"),
    "verify": ("sglang_ext.tools.verify", "does a running server's storage give back its tokens"),
    "storage": ("sglang_ext.storage.cli", "list, measure, check and remove stored pages"),
    "patches": ("sglang_ext.patches.cli", "patches of the engine in place of hooks"),
    "gpu-check": ("sglang_ext.tools.gpu_check", "bytes and speed of the copy kernel on this GPU"),
    "bench": ("sglang_ext.tools.bench", "benchmarks of a checkout"),
}
"""By name: the module whose ``main`` runs it, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool that is named; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="sglang-ext", description="Tools beside the engine.")
    parser.add_argument("--version", action="version", version=f"sglang-ext {__version__}")
    commands = parser.add_subparsers(metavar="TOOL", dest="tool", required=True)
    for name, (_, use) in TOOLS.items():
        # each tool has a parser of its own
        commands.add_parser(name, help=use, add_help=False)
    module, _ = TOOLS[parser.parse_args(words[:1]).tool]
    status: int = importlib.import_module(module).main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
