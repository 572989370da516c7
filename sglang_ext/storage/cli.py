"""``sglang-ext storage``: what lies in a directory of pages, and how to get rid of it.

It may run beside servers: a page that is removed is computed again, a directory made again.
"""

import collections
import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sglang_ext.arguments import Parser, input_folder, refusal
from sglang_ext.storage.page_directories import page_files, rank_directories, remove_if_empty

_NAMED = 10
"""Damaged pages that are named, of many."""
_UNITS = {"h": 3600.0, "d": 86400.0}


@dataclasses.dataclass(slots=True)
class _Model:
    """What a model and layout has left: files, bytes, when the last one was used."""

    files: int = 0
    size: int = 0
    used: float = 0.0

    def add(self, stat: os.stat_result) -> None:
        self.files += 1
        self.size += stat.st_size
        self.used = max(self.used, stat.st_mtime)


def main(arguments: Sequence[str]) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="sglang-ext storage", description=__doc__.partition("\n\n")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    what = {
        "ls": "list models and layouts, the most recently used first",
        "du": "say what each rank of a model takes, of pages and of windows, and what is free",
        "gc": "remove what was not used for a while, and directories without pages",
        "check": "read every page and compare its checksum",
    }
    made = {}
    for name, text in what.items():
        made[name] = commands.add_parser(name, help=text, description=text)
        made[name].add_argument(
            "directory", type=input_folder, help="file_storage_path of the servers"
        )
    made["gc"].add_argument(
        "--unused-for", type=_seconds, required=True, metavar="TIME", help="such as 12h or 7d"
    )
    made["gc"].add_argument("--dry-run", action="store_true", help="only say what would be removed")
    made["check"].add_argument(
        "--remove", action="store_true", help="remove what is damaged; a server does it too"
    )
    given = parser.parse_args(arguments)
    if given.command == "gc":
        return _collect(given.directory, given.unused_for, dry_run=given.dry_run)
    if given.command == "check":
        return _check(given.directory, remove=given.remove)
    return _list(given.directory) if given.command == "ls" else _measure(given.directory)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hd])", text)
    if match is None:
        raise refusal(repr(text), "a number of hours or days: 12h, 7d")
    return float(match[1]) * _UNITS[match[2]]


def _list(base: Path) -> int:
    models: dict[str, _Model] = collections.defaultdict(_Model)
    for directory in rank_directories(base):
        model = models[directory.parent.name]
        for _, stat in page_files([directory]):
            model.add(stat)
    now = time.time()
    print(f"{'GB':>10} {'pages':>9} {'unused for':>10}  model and layout")
    for name, model in sorted(models.items(), key=lambda entry: -entry[1].used):
        unused = f"{(now - model.used) / 3600:.1f}h" if model.files else "-"
        print(f"{model.size / 1e9:10.3f} {model.files:9} {unused:>10}  {name}")
    size, files = (sum(getattr(m, what) for m in models.values()) for what in ("size", "files"))
    print(f"{size / 1e9:10.3f} {files:9} {'':>10}  in all")
    return 0


def _measure(base: Path) -> int:
    whole = _Model()
    print(f"{'GB':>10} {'windows':>10} {'pages':>9}  of a rank")
    for directory in sorted(rank_directories(base)):
        rank, windows = _Model(), _Model()
        for path, stat in page_files([directory]):
            for one in (rank, whole, *([windows] if path.suffix else [])):
                one.add(stat)
        name = f"{directory.parent.name}/{directory.name}"
        print(f"{rank.size / 1e9:10.3f} {windows.size / 1e9:10.3f} {rank.files:9}  {name}")
    print(f"{whole.size / 1e9:10.3f} {'':>10} {whole.files:9}  in all")
    print(f"{shutil.disk_usage(base).free / 1e9:10.3f} {'':>10} {'':>9}  free on the filesystem")
    return 0


def _check(base: Path, *, remove: bool) -> int:
    from sglang_ext.storage.page_files import problem_of

    read, bad, left = _Model(), 0, 0
    for path, stat in page_files(rank_directories(base)):
        try:
            problem = problem_of(path)
        except FileNotFoundError:  # it has just gone
            continue
        except OSError as error:
            problem = f"not readable: {error.strerror}"
        read.add(stat)
        if problem is None:
            continue
        bad += 1
        if bad <= _NAMED:
            print(f"{path}: {problem}", file=sys.stderr)
        try:
            if remove:
                path.unlink(missing_ok=True)
        except OSError as error:
            left += 1
            print(f"{path} was not removed: {error.strerror}", file=sys.stderr)
    verb = "were removed" if remove else "are damaged"
    print(f"{read.files} pages, {read.size / 1e9:.3f} GB read; {bad - left} {verb}")
    return int(left > 0 if remove else bad > 0)


def _collect(base: Path, unused_for_s: float, *, dry_run: bool) -> int:
    before = time.time() - unused_for_s
    gone, failed = _Model(), 0
    for directory in rank_directories(base):
        for path, stat in page_files([directory], temporary=True):
            if stat.st_mtime >= before:
                continue
            try:
                if not dry_run:
                    path.unlink(missing_ok=True)
                gone.add(stat)
            except OSError as error:
                failed += 1
                if failed == 1:
                    print(f"{path} was not removed: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):
            if not dry_run and directory.stat().st_mtime < before:
                remove_if_empty(directory)
    verb = "would be removed" if dry_run else "removed"
    print(f"{gone.files} pages, {gone.size / 1e9:.3f} GB {verb}")
    if failed:
        print(f"{failed} pages were not removed", file=sys.stderr)
    return int(failed > 0)
