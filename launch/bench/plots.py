"""Draws what the benchmarks have measured.

python -m launch.bench.plots --data docs/benchmarks/data --out docs/benchmarks
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sglang_ext.arguments import Parser, input_folder, output_folder

Report = dict[str, Any]


def core(report: Report) -> Figure:
    """Time of each tree operation as a ratio to the engine's Rust core, a panel for each number
    of pages, a line for each prompt length."""
    rows = [row for row in report["rows"] if row["page"] == 64]
    sizes = sorted({row["pages"] for row in rows})
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure = Figure(figsize=(4 * len(sizes), 4), layout="constrained")
    for axes, size in _panels(figure, sizes, sharey=True):
        for prompt in sorted({row["prompt"] for row in rows}):
            cell = [row for row in rows if (row["pages"], row["prompt"]) == (size, prompt)]
            if not cell:
                continue
            ratios = {row["operation"]: row["us"]["ours"] / row["us"]["rust"] for row in cell}
            axes.plot(
                [ratios[name] for name in operations],
                range(len(operations)),
                "o",
                label=f"{prompt // 1024}k tokens",
            )
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(title=f"{size:,} pages of 64", xlabel="time, ours / Rust core", xscale="log")
        axes.set_yticks(range(len(operations)), operations)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.axes[0].invert_yaxis()
    return figure


def copies(report: Report) -> Figure:
    """Bandwidth of page copies, of memcpy and of indexed copies, one thread, pages of 64."""
    wanted = [
        r for r in report["rows"] if (r["page"], r["threads"], r["row_bytes"]) == (64, 1, 2048)
    ]
    ways = ("kernel", "memcpy", "indexed")
    names = list(dict.fromkeys(row["copy"] for row in wanted))
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axes, name in _panels(figure, names, sharey=True):
        rows = [row for row in wanted if row["copy"] == name]
        labels = [row["layout"] for row in rows]
        _bars(axes, labels, {way: [row["gb_per_s"][way] for row in rows] for way in ways})
        axes.set(title=name)
    figure.axes[0].set(ylabel="GB/s")
    figure.axes[0].legend()
    return figure


def pairs(report: Report) -> Figure:
    """Medians of each server of one shape."""
    panels = {
        "ttft_mean_s": "mean TTFT, s",
        "input_tokens_per_s": "input tokens/s",
        "hit_rate": "hit rate",
        "between_steps_mean_us": "between forward passes, µs",
    }
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    servers = report["median"]
    for axes, (key, title) in _panels(figure, list(panels.items())):
        labels = [name.replace(", ", "\n") for name in servers]
        axes.bar(labels, [values[key] for values in servers.values()])
        for turn in report["turns"]:
            axes.plot(labels, [values[key] for values in turn.values()], "k.", markersize=3)
        axes.set(title=title, ylim=(0, None))
        axes.tick_params("x", labelsize=7)
    return figure


def trace(report: Report) -> Figure:
    """A recorded trace: tokens found, beside what LRU and MIN would find, and what the scheduler
    spends on the cache, against the size of the host."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    rate, time = figure.subplots(1, 2)
    sizes = [row["host_gb"] for row in report["bounds"]]
    bounds = (("min", "MIN, knows what comes", "k--"), ("lru", "LRU, one tier", "k:"))
    for bound, name, line in bounds:
        rate.plot(sizes, [row[bound] for row in report["bounds"]], line, label=name)
    for system, name in (("ours", "ours"), ("stock", "stock + HiCache")):
        cells = [cell for cell in report["cells"] if _is_of(cell["system"], system)]
        cells.sort(key=lambda cell: cell["host_gb"])
        hosts = [cell["host_gb"] for cell in cells]
        rate.plot(hosts, [cell["hit_rate"] for cell in cells], "o-", label=name)
        time.plot(hosts, [cell["cache_ms_per_request"] for cell in cells], "o-", label=name)
    rate.set(title="tokens of prompts found", ylim=(0, None))
    time.set(title="CPU time of the cache, ms a request", ylim=(0, None))
    for axes in (rate, time):
        axes.set_xscale("symlog", linthresh=50)
        axes.set(xlabel="host, GB", xlim=(0, None))
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _is_of(system: str, name: str) -> bool:
    """Without a host, stock is another system of the report."""
    return system == name or (name == "stock" and system == "stock-no-host")


def _panels(figure: Figure, what: Sequence[Any], **options: Any) -> Iterator[tuple[Axes, Any]]:
    """One panel for each, side by side."""
    return zip(figure.subplots(1, len(what), squeeze=False, **options)[0], what, strict=True)


def _bars(axes: Axes, labels: Sequence[str], groups: dict[str, list[float]]) -> None:
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(places, values, width, label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=20, fontsize=8)


DRAWINGS: dict[str, Callable[[Report], Figure]] = {
    "core": core,
    "copies": copies,
    "no_reuse": pairs,
    "multi_turn": pairs,
    "trace": trace,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=input_folder, default=Path("out"))
    parser.add_argument("--out", type=output_folder, default=Path("out"))
    return parser.parse_args(argv)


def main() -> None:
    """Draw every report that is there."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        if (path := args.data / f"{name}.json").exists():
            draw(json.loads(path.read_text())).savefig(args.out / f"{name}.png", dpi=90)
            print(f"written: {args.out / name}.png")


if __name__ == "__main__":
    main()
