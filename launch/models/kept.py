"""Models that are kept between runs, and made by whoever needs one first."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def kept(out: Path, make: Callable[[Path], object]) -> Path:
    """A directory that ``make`` has written, whole or not at all: another process may look for it
    or make it too, and the first one that has it ready wins."""
    if not out.exists():
        unfinished = out.with_name(f"{out.name}.{os.getpid()}")
        make(unfinished)
        # there is one already
        with contextlib.suppress(OSError):
            unfinished.rename(out)
        shutil.rmtree(unfinished, ignore_errors=True)
    return out
