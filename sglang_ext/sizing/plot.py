"""Figures of a sizing run."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sglang_ext.arguments import output_file, refusal

Row = dict[str, Any]
_PANELS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("hit rate", lambda row: row["hit_rate"]),
    ("written to the host, GB", lambda row: row["written_bytes"] / 1e9),
    ("loaded from the host, GB", lambda row: row["loaded_bytes"] / 1e9),
    ("computed again, part of the prompts", lambda row: row["again"] / max(1, row["prompt"])),
)


def file(text: str) -> Path:
    """Type of an argument: a file that a drawing can be written to."""
    path = output_file(text)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib") from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise refusal(text, f"a name that ends with one of {', '.join(formats)}")
    return path


def draw(rows: Sequence[Row], path: Path) -> None:
    """Hit rate, bytes moved and recompute against host size, a line for each policy."""
    from matplotlib.figure import Figure

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
