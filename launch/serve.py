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


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and everything else for the engine."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="see sglang for the rest"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU reference platform")
    parser.add_argument(
        "--device-only", action="store_true", help="our cache without its host tier"
    )
    parser.add_argument("--stock", action="store_true", help="SGLang's own cache, to compare")
    return parser.parse_known_args(argv)


def check_plugin() -> None:
    """Exit if the engine would not find or not load the plugin."""
    names = {p.name for p in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    if "swa_hicache" not in names:
        sys.exit("sglang-ext is not installed in this environment: pip install sglang-ext")
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "swa_hicache" not in {name.strip() for name in allowed.split(",")}:
        sys.exit(f"SGLANG_PLUGINS={allowed} keeps the plugin from loading; add swa_hicache")


def main() -> None:
    """Replace this process by the server."""
    own, engine = parse_args()
    if own.cpu:
        os.environ.update(CPU)
    if not own.stock:
        check_plugin()
        engine += OURS
        if not own.device_only:
            engine.append("--enable-hierarchical-cache")
    command = [sys.executable, "-m", "sglang.launch_server", *engine]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
