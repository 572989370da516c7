"""Writes generated traffic as a trace, for ``launch.bench.trace``.

    python -m launch.bench.write_traffic --traffic chat --times 4 --out out/chat.jsonl

Lines of token ids: the prompt, and the answer that goes into the next prompt of its session.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from launch.bench.hits import SHAPES, VOCABULARY
from sglang_ext.arguments import Parser, output_file, whole
from sglang_ext.sizing.traffic import interleave


def write(name: str, times: int, seed: int, out: Path) -> int:
    """Write the requests of a shape of ``launch.bench.hits``, with so many times its sessions;
    returns how many they are."""
    shape, active = SHAPES[name]
    shape = dataclasses.replace(shape, sessions=times * shape.sessions)  # type: ignore[type-var]
    written = 0
    with out.open("w") as lines:
        for prompt, answer in interleave(shape, active, VOCABULARY, seed):
            record = {"input_ids": prompt.tolist(), "output_ids": answer.tolist()}
            lines.write(json.dumps(record) + "\n")
            written += 1
    return written


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traffic", choices=sorted(SHAPES), required=True)
    parser.add_argument("--times", type=whole(1), default=1, help="times the sessions of its bench")
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--out", type=output_file, default=Path("out/traffic.jsonl"))
    return parser.parse_args(argv)


def main() -> None:
    """Write, and say how much."""
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{write(args.traffic, args.times, args.seed, args.out)} requests: {args.out}")


if __name__ == "__main__":
    main()
