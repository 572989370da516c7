"""Figures of a sizing run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_PANELS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("hit rate", lambda row: row["hit_rate"]),
    ("written to the host, GB", lambda row: row["written_bytes"] / 1e9),
    ("loaded from the host, GB", lambda row: row["loaded_bytes"] / 1e9),
    ("computed again, part of the prompts", lambda row: row["again"] / max(1, row["prompt"])),
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Hit rate, bytes moved and recompute against host size, a line for each policy.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(4 * len(_PANELS), 3.5), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            of_policy = [row for row in rows if row["policy"] == policy]
            axes.plot(
                [row["host_gb"] for row in of_policy],
                [value(row) for row in of_policy],
                marker="o",
                label=policy,
            )
        axes.set(title=title, xlabel="host memory, GB", ylim=(0, None))
    axes.legend()
    figure.savefig(path)
