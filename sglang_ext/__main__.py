"""``python -m sglang_ext``: tools beside the engine."""

import sys
from collections.abc import Callable

from sglang_ext.patches import cli as patches
from sglang_ext.sizing import cli as size
from sglang_ext.storage import cli as storage
from sglang_ext.tools import gpu_check, verify

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "gpu-check": gpu_check.main,
    "patches": patches.main,
    "size": size.main,
    "storage": storage.main,
    "verify": verify.main,
}


def main() -> int:
    """Run the named tool."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in COMMANDS:
        print(f"usage: python -m sglang_ext {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 2
    return COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
