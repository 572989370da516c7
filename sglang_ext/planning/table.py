"""Rows of a name and what is said of it, for a reader."""

from collections.abc import Sequence

Row = tuple[str, str]
"""A name, empty in a row that goes on with the one before, and what is said."""


def lines(rows: Sequence[Row], indent: str = "  ") -> list[str]:
    """One line for each row, what is said in one column."""
    width = max(len(name) for name, _ in rows)
    return [f"{indent}{name:<{width}}  {said}" for name, said in rows]


def size(count: float) -> str:
    """A number of bytes."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.2f} kB"
