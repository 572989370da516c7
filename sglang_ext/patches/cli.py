"""``sglang-ext patches``: patches of the engine, for people who run a fork of it.

Each one replaces one of the extension's hooks, which then stays out. Nothing needs them.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_ext.arguments import Parser, input_folder, refusal
from sglang_ext.patches.patch_set import (
    Patch,
    PatchError,
    plan,
    refuse_other_versions,
    series,
    write,
)

_COMMANDS = {
    "list": "say what each patch does, and whether it is applied",
    "check": "apply nothing, but say what apply would do",
    "apply": "apply patches: all that are named, or none if one of them cannot be",
    "revert": "take patches back, in the same way",
}
_SAID = {
    # (what is said of a patch that is there, of one that is not)
    "check": ("is applied already", "can be applied"),
    "apply": ("is applied already", "is applied now"),
    "revert": ("is taken back now", "is not applied"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="sglang-ext patches", description=__doc__.partition("\n\n")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "patches", nargs="*", type=_patch, metavar="NAME", help="or its number; all if none"
        )
        command.add_argument(
            "--root",
            type=input_folder,
            help="folder that holds the package sglang (default: where it is installed)",
        )
    given = parser.parse_args(arguments)
    try:
        _run(given.command, given.patches or series(), given.root or _installed())
    except PatchError as reason:
        print(f"{parser.prog}: {reason}; nothing was changed", file=sys.stderr)
        return 1
    return 0


def _run(command: str, patches: list[Patch], root: Path) -> None:
    refuse_other_versions(root)
    applied = [patch.is_applied(root) for patch in patches]
    if command == "list":
        for patch, there in zip(patches, applied, strict=True):
            print(f"{patch.name}  {'applied' if there else 'not applied'}\n    {patch.subject}")
        return
    changes = plan(patches, root, revert=command == "revert")
    if command != "check":
        write(changes)
    for patch, there in zip(patches, applied, strict=True):
        print(f"{patch.name} {_SAID[command][0 if there else 1]}")


def _patch(text: str) -> Patch:
    known = series()
    for patch in known:
        if text in (patch.name, patch.name.partition("-")[0]):
            return patch
    raise refusal(repr(text), "one of " + ", ".join(patch.name for patch in known))


def _installed() -> Path:
    """The folder that the engine would be imported from; importing it takes seconds."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError("sglang is not installed, and there is no --root")
    return Path(next(iter(spec.submodule_search_locations))).parent
