"""Numbers as people read them."""

import math
from collections.abc import Callable, Sequence

Format = Callable[[float], str]
"""A number with its unit."""


def share(value: float) -> str:
    """A part of one, in percent."""
    return f"{value * 100:.1f} %".replace(".0 %", " %")


def size(value: float) -> str:
    """Bytes, with a decimal prefix."""
    return _prefixed(value, 1e3, ("B", "kB", "MB", "GB", "TB", "PB"))


def speed(value: float) -> str:
    """Bytes a second."""
    return f"{size(value)}/s"


def count(value: float) -> str:
    """Things that are counted, tokens among them."""
    return f"{value:,.0f}" if value < 1e6 else _prefixed(value / 1e6, 1e3, ("M", "G", "T"))


def seconds(value: float) -> str:
    """A time, in the largest unit that fits."""
    for name, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= length:
            return f"{value / length:.3g} {name}"
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1e3:.3g} ms"


def _prefixed(value: float, step: float, names: Sequence[str]) -> str:
    for name in names[:-1]:
        if abs(value) < step:
            return f"{value:.3g} {name}"
        value /= step
    return f"{value:.3g} {names[-1]}"


def ticks(most: float, count: int = 4) -> list[float]:
    """Round numbers from 0 on, the last of them at least ``most``."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / count))
    step = next(step for factor in (1, 2, 2.5, 5, 10) if (step := factor * power) * count >= most)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]
