"""A page about runs of a benchmark of conversations."""

import json
from pathlib import Path
from typing import Any

from sglang_ext.tools.report import units
from sglang_ext.tools.report.charts import Axis, Series, bars, columns
from sglang_ext.tools.report.page import Section, page
from sglang_ext.tools.report.server import TIERS

Runs = dict[str, dict[str, Any]]


def read_runs(path: Path) -> Runs:
    """Runs by name, of the demo (one JSON object) or of ``multiturn`` (a line of JSON each).

    Raises:
        ValueError: the file is something else.
    """
    text = path.read_text()
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict) and "hit_rate" in found:
        found = [found]
    if isinstance(found, list):
        found = {
            f"{number}. {run.get('tag') or 'run'}": run
            for number, run in enumerate(found, start=1)
            if isinstance(run, dict)
        }
    if not found or not all(isinstance(run, dict) and run.get("rounds") for run in found.values()):
        raise ValueError("neither a log of launch.bench.multiturn nor out/demo.json")
    runs: Runs = found
    return runs


def bench_page(runs: Runs, name: str) -> str:
    """The file.

    Args:
        name: of the file with the runs.

    Raises:
        KeyError: a run lacks a figure.
    """
    names = list(runs)
    best = max(names, key=lambda run: runs[run]["hit_rate"]["total"])
    figures = [
        ("runs", units.count(len(runs))),
        (f"best hit rate: {best}", units.share(runs[best]["hit_rate"]["total"])),
        (
            "prompt tokens of all runs",
            units.count(sum(run["prompt_tokens"] for run in runs.values())),
        ),
        ("requests of all runs", units.count(sum(run["requests"] for run in runs.values()))),
    ]
    totals = [
        bars(
            "Hit rate by tier",
            "Share of prompt tokens that were not computed.",
            names,
            [
                Series(tier, color, [run["hit_rate"][tier] for run in runs.values()])
                for tier, color in TIERS.items()
            ],
            Axis("run", units.share, 1.0),
        ),
        bars(
            "Time to first token",
            "Mean, and the 99th percentile.",
            names,
            [
                Series(said, color, [run["ttft_s"][key] for run in runs.values()])
                for said, key, color in (("mean", "mean", "c1"), ("99 %", "p99", "c6"))
            ],
            Axis("run", units.seconds),
        ),
        bars(
            "Throughput",
            "Tokens of prompts a second, found ones among them.",
            names,
            [
                Series(
                    "prompt tokens a second",
                    "c3",
                    [run["throughput"]["input_tokens_per_s"] for run in runs.values()],
                )
            ],
            Axis("run", units.count),
        ),
    ]
    rounds = [_rounds(run_name, run) for run_name, run in runs.items()]
    return page(
        "Prefix cache report",
        name,
        figures,
        [Section("All runs", totals), Section("Hit rate by round", rounds)],
        f"Written by sglang-ext report from {name}.",
    )


def _rounds(name: str, run: dict[str, Any]) -> str:
    rounds = [each["hit_rate"] for each in run["rounds"]]
    return columns(
        name,
        "Share of prompt tokens that were not computed, by round of the conversations.",
        [number + 0.5 for number in range(len(rounds) + 1)],
        [Series(tier, color, [r[tier] for r in rounds]) for tier, color in TIERS.items()],
        (Axis("round", lambda number: f"{number:g}"), Axis("share", units.share, 1.0)),
    )
