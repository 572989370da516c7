"""``sglang-ext plan``: what fits, before a server is started.

    sglang-ext plan --model-path openai/gpt-oss-120b --tp 2 --hicache-size 200

takes a launch line, and says what a server with it will keep on the host, how much of it fits, and
what goes over PCIe. The server logs the same at its start. No engine is needed.
"""

import sys
from collections.abc import Sequence

from sglang_ext.arguments import Parser, number
from sglang_ext.config import from_environment
from sglang_ext.planning import launch_line
from sglang_ext.planning.model_config import (
    ModelConfigError,
    architecture,
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
    made.add_argument(
        "--config",
        metavar="MODEL",
        help="config.json, its folder, or a model in the hub's cache; default: --model-path",
    )
    made.add_argument(
        "--device-gb",
        type=number(above=0),
        help="KV memory of one device, where the line has no --max-total-tokens",
    )
    made.add_argument(
        "--link-gb-s", type=number(above=0), default=50.0, help="device to host, default: 50"
    )
    launch_line.add_options(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: planned; 2: an option is not allowed, or there is no such model."""
    made = parser()
    given, others = made.parse_known_args(arguments)
    line = launch_line.from_options(given, others)
    name = given.config or line.model
    if name is None:
        made.error("--config or --model-path is needed")
    # only what computes needs the compiled loops
    from sglang_ext.planning.plan import Plan, PlanError

    device = None if given.device_gb is None else given.device_gb * 1e9
    try:
        config = load(find(name))
        model = shape_of(config, line.dtype, line.kv_cache_dtype)
        tokens = from_environment().checkpoint_tokens
        plan = Plan.of(architecture(config), model, line, device, tokens, given.link_gb_s)
    except (ModelConfigError, PlanError) as error:
        made.error(str(error))
    print("\n".join(lines(plan.rows(), indent="")))
    if line.others:
        print(f"not looked at: {' '.join(line.others)}", file=sys.stderr)
    return 0
