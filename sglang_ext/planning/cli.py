"""``sglang-ext plan``: what fits, before a server is started.

    sglang-ext plan --model-path openai/gpt-oss-120b --tp 2 --hicache-size 200

takes a launch line, and says what a server with it will keep on the host, how much of it fits, and
what goes over PCIe. The server logs the same at its start. No engine is needed.

    sglang-ext plan --preset gpt-oss-120b

prints the line that operators start a known model with, and its plan; options that follow count.
"""

import argparse
import sys
from collections.abc import Sequence

from sglang_ext.arguments import Parser, number
from sglang_ext.config import from_environment
from sglang_ext.planning import launch_line, preset
from sglang_ext.planning.model import Shape
from sglang_ext.planning.model_config import (
    ModelConfigError,
    architecture,
    draft_of,
    find,
    load,
    shape_of,
)
from sglang_ext.planning.table import lines


def parser() -> Parser:
    """Command line: our own options and those of a launch line."""
    made = Parser(
        prog="sglang-ext plan",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="Other options of the line are named and left alone.",
        allow_abbrev=False,
    )
    _add_own(made)
    launch_line.add_options(made)
    return made


def _add_own(made: argparse.ArgumentParser) -> None:
    """What is not of a launch line."""
    made.add_argument(
        "--config",
        metavar="MODEL",
        help="config.json, its folder, or a model in the hub's cache; default: --model-path",
    )
    made.add_argument(
        "--preset", choices=preset.names(), help="the launch line of a known model, and its plan"
    )
    made.add_argument(
        "--device-gb",
        type=number(above=0),
        help="KV memory of one device, where the line has no --max-total-tokens",
    )
    made.add_argument(
        "--link-gb-s", type=number(above=0), default=50.0, help="device to host, default: 50"
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: planned; 2: an option is not allowed, or there is no such model."""
    made = parser()
    given, others = made.parse_known_args(arguments)
    # only what computes needs the compiled loops
    from sglang_ext.planning.plan import Plan, PlanError

    try:
        name, model, line, device = _asked(made, given, others, arguments)
        tokens = from_environment().checkpoint_tokens
        draft = draft_of(line)
        plan = Plan.of(name, model, line, device, tokens, given.link_gb_s, draft)
    except (ModelConfigError, PlanError) as error:
        made.error(str(error))
    print("\n".join(lines(plan.rows(), indent="")))
    if line.others and given.preset is None:
        print(f"not looked at: {' '.join(line.others)}", file=sys.stderr)
    return 0


def _asked(
    made: Parser, given: argparse.Namespace, others: Sequence[str], arguments: Sequence[str]
) -> tuple[str, Shape, launch_line.LaunchLine, float | None]:
    """Name and shape of the model, launch line, and bytes of KV of a device. A preset's line is
    printed.

    Raises:
        ModelConfigError: there is no such model.
    """
    device = None if given.device_gb is None else given.device_gb * 1e9
    if given.preset is not None:
        own = Parser(add_help=False, allow_abbrev=False)
        _add_own(own)
        _, more = own.parse_known_args(arguments)
        known = preset.load(given.preset)
        line = known.line(more)
        print(known.command(more), end="\n\n")
        if device is None and known.device_gb is not None:
            device = known.device_gb * 1e9
        return given.preset, known.model(line), line, device
    line = launch_line.from_options(given, others)
    name = given.config or line.model
    if name is None:
        made.error("--config, --model-path or --preset is needed")
    config = load(find(name))
    return architecture(config), shape_of(config, line.dtype, line.kv_cache_dtype), line, device
