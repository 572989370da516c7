"""Types of command line arguments, for all tools: a bad value ends a tool before it does
anything, with one line that names the option, the value and what is allowed."""

import argparse
import math
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options; exit status 2."""

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        # "argument --x: 0 is not allowed" reads better without what argparse puts around it
        said = re.sub(r"^argument (\S+): (?=.* is not allowed; use )", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {said}\n")


def refusal(value: object, allowed: str) -> argparse.ArgumentTypeError:
    """What a type raises: a value, and what is allowed in its place."""
    return argparse.ArgumentTypeError(f"{value} is not allowed; use {allowed}")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Whole numbers from ``least`` on, up to ``most``."""
    allowed = f"a whole number of at least {least}"
    if most is not None:
        allowed = f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise refusal(repr(text), allowed) from None
        if value < least or (most is not None and value > most):
            raise refusal(value, allowed)
        return value

    return parse


def number(
    least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> Callable[[str], float]:
    """Finite numbers from ``least`` to ``most`` that are larger than ``above``."""
    bounds = [f"of at least {least:g}"] if least > -math.inf else []
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"up to {most:g}"] if most < math.inf else []
    allowed = " ".join(["a number", " and ".join(bounds)]).strip()

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise refusal(text, allowed)
        return value

    return parse


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SHARE = re.compile(r"(\d+(?:\.\d+)?)(%|" + "|".join(_UNITS) + ")")


def share(text: str) -> tuple[int | None, float | None]:
    """A part of something: (bytes, None) of "20GB", (None, percent) of "25%"."""
    allowed = f"bytes like 20GB, in one of {', '.join(_UNITS)}, or percent like 25%"
    found = _SHARE.fullmatch(text)
    if found is None:
        raise refusal(repr(text), allowed)
    value, unit = float(found[1]), found[2]
    if unit != "%":
        return round(value * _UNITS[unit]), None
    if value > 100:
        raise refusal(repr(text), "at most 100%")
    return None, value


port = whole(1, 65535)
"""A TCP port."""


def output_file(text: str) -> Path:
    """A file that can be written, in a folder that is there or can be made."""
    path = Path(text)
    if not text or path.is_dir():
        raise refusal(repr(text), "the name of a file")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    place = path if path.exists() else folder
    if not (folder.is_dir() and os.access(place, os.W_OK)):
        raise refusal(text, f"a file that can be written: {place} cannot")
    return path


def output_folder(text: str) -> Path:
    """A folder that can be written into, or made."""
    output_file(str(Path(text) / "a file"))
    return Path(text)


def input_file(text: str) -> Path:
    """A file that can be read."""
    path = Path(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise refusal(text, "a file that can be read")
    return path


def input_folder(text: str) -> Path:
    """A folder that can be read."""
    path = Path(text)
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        raise refusal(repr(text), "a folder that can be read")
    return path


def url(text: str) -> str:
    """The address of a server, without a slash at its end."""
    allowed = "an address like http://127.0.0.1:30000"
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good or not text.isprintable() or " " in text:
        raise refusal(repr(text), allowed)
    return text.rstrip("/")


def core(text: str) -> int:
    """The number of a processor that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    if not text.isdigit() or int(text) not in usable:
        raise refusal(text, f"one of the cores {', '.join(map(str, usable))}")
    return int(text)
