"""Start SGLang with the tiered cache. Thin: unknown options go to the engine as they are.

    python -m launch.serve --model-path MODEL --tp 2 --hicache-size 200

It checks that the plugin can be found, selects the backend and the host tier, and
becomes ``sglang.launch_server``.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from launch.server import CPU, OURS
from sglang_ext.arguments import Parser
from sglang_ext.config import BACKEND, TOGGLE


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and everything else for the engine."""
    parser = Parser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="see sglang for the rest"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU reference platform")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--device-only", action="store_true", help="our cache without its host tier"
    )
    chosen.add_argument("--stock", action="store_true", help="SGLang's own cache, to compare")
    own, engine = parser.parse_known_args(argv)
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--radix-cache-backend")
    asked.add_argument("--enable-hierarchical-cache", action="store_true")
    given, _ = asked.parse_known_args(engine)
    backend = given.radix_cache_backend
    if own.stock and backend == BACKEND:
        parser.error(f"--stock and --radix-cache-backend {BACKEND} exclude each other")
    if not own.stock and backend not in (None, BACKEND):
        parser.error(
            f"--radix-cache-backend {backend} selects another cache than this; use --stock with it"
        )
    if own.device_only and given.enable_hierarchical_cache:
        parser.error("--device-only and --enable-hierarchical-cache exclude each other")
    return own, engine


def check_plugins(needed: Sequence[str]) -> None:
    """Exit if the engine would not find or not load the plugins."""
    names = {p.name for p in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    allowed = os.environ.get("SGLANG_PLUGINS")
    for plugin in needed:
        if plugin not in names:
            sys.exit(f"the plugin {plugin} is not installed in this environment: pip install it")
        if allowed and plugin not in {name.strip() for name in allowed.split(",")}:
            sys.exit(f"SGLANG_PLUGINS={allowed} keeps a plugin from loading; add {plugin}")


def server_environment(own: argparse.Namespace) -> dict[str, str]:
    """Variables of the server. Options alone select the cache: an exported variable that selects
    it too would make ours of stock, and switch the host tier of ours on."""
    dropped = "SGLANG_EXT_" if own.stock else TOGGLE
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, **(CPU if own.cpu else {})}


def server_arguments(own: argparse.Namespace, engine: Sequence[str]) -> list[str]:
    """Options of the server: those that are for the engine, and what selects a cache."""
    host = [] if own.device_only else ["--enable-hierarchical-cache"]
    return [*engine, *([] if own.stock else [*OURS, *host])]


def main() -> None:
    """Replace this process by the server."""
    own, engine = parse_args()
    check_plugins([*([] if own.stock else [BACKEND]), *(["ext_cpu_fixes"] if own.cpu else [])])
    command = [sys.executable, "-m", "sglang.launch_server", *server_arguments(own, engine)]
    os.execve(command[0], command, server_environment(own))


if __name__ == "__main__":
    main()
