"""``sglang-ext doctor``: what is wrong, and what to do about it.

    sglang-ext doctor -- --model-path openai/gpt-oss-120b --tp 2 --hicache-size 200

checks this installation, this machine and a launch line, which stands after ``--``: options, with
or without the variables and the command that begin it. One line for each check; the exit status is
1 if one of them found a fault. Nothing is changed, and no server is started.
"""

import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sglang_ext.arguments import Parser, input_folder
from sglang_ext.config import from_environment
from sglang_ext.doctor.finding import Finding, Verdict, fault, note, ok
from sglang_ext.doctor.installation import Engine
from sglang_ext.doctor.machine import Machine
from sglang_ext.errors import StartupError
from sglang_ext.planning.launch_line import LaunchLine, parse, take_apart


def parser() -> Parser:
    """Command line."""
    made = Parser(
        prog="sglang-ext doctor",
        usage="%(prog)s [-h] [--root ROOT] [-- LAUNCH LINE]",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    made.add_argument(
        "--root",
        type=input_folder,
        help="folder that holds the package sglang (default: where it is installed)",
    )
    return made


def main(
    arguments: Sequence[str], machine: Machine | None = None, engine: Engine | None = None
) -> int:
    """Exit status 0: no fault; 1: at least one; 2: an option is not allowed.

    Args:
        machine, engine: what is looked at; None stands for this machine and its engine.
    """
    words = list(arguments)
    own, line = words, None
    variables: dict[str, str] = {}
    if "--" in words:
        cut = words.index("--")
        own = words[:cut]
        variables, line = take_apart(words[cut + 1 :])
    made = parser()
    given = made.parse_args(own)
    if engine is None:
        from sglang_ext.adapter.installed import InstalledEngine

        engine = InstalledEngine()
        # an engine that is imported says much
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore", module=r"sglang\.")
    machine = machine or Machine.here()
    machine = dataclasses.replace(machine, environment={**machine.environment, **variables})
    worst = False
    for finding in findings(machine, engine, line, given.root or _root()):
        print(finding.line(), flush=True)
        worst |= finding.verdict is Verdict.FAULT
    return int(worst)


def findings(
    machine: Machine, engine: Engine, words: Sequence[str] | None, root: Path | None
) -> Iterator[Finding]:
    """All checks, in the order in which one may be the cause of the next.

    Args:
        words: the options of a launch line; None without one.
        root: the folder that holds the engine's package.
    """
    from sglang_ext.doctor import directory, installation, memory

    wrong = engine.version_problem() is not None
    yield from installation.check(engine, machine.environment, root)
    line = LaunchLine() if words is None else parse(words, "sglang-ext doctor")
    budget = None
    if words is not None:
        selected = _selected(machine.environment)
        if not wrong and selected is not None:
            yield from _line(engine, words, selected=selected)
        budget, finding = _budget(line, on_host=line.host_tier or selected is not False)
        yield finding
    pinned = not wrong and engine.device() != "cpu"
    ranks = -(-line.ranks // line.nodes)
    yield from memory.check(machine, budget, ranks, pinned=pinned)
    if line.storage_backend == "file" and not wrong:
        try:
            settings = engine.storage_settings(line.storage_settings)
        except ValueError as error:
            what = f"--hicache-storage-backend-extra-config cannot be read: {error}"
            yield fault("storage", what, "use a JSON object, or @ and a file")
        else:
            yield directory.check(settings, machine.environment)
    else:
        yield ok("storage", line.storage_backend or "none (--hicache-storage-backend)")


def _selected(environment: Mapping[str, str]) -> bool | None:
    """Whether the environment selects the cache; None if a variable is wrong, which was said."""
    try:
        return from_environment(environment).selected
    except StartupError:
        return None


def _line(engine: Engine, words: Sequence[str], *, selected: bool) -> Iterator[Finding]:
    problems = engine.line_problems(words, selected=selected)
    for problem in problems:
        yield fault("launch line", problem, "docs/configuration.md lists what is allowed")
    if not problems:
        yield ok("launch line", "every option is supported")


def _budget(line: LaunchLine, *, on_host: bool) -> tuple[int | None, Finding]:
    """Host memory of a rank in bytes, as far as it can be told, and what there is to say of it.

    Args:
        on_host: whether there is a host tier.
    """
    from sglang_ext.planning.model_config import (
        ModelConfigError,
        architecture,
        draft_of,
        find,
        load,
        shape_of,
    )
    from sglang_ext.planning.plan import Plan, PlanError

    asked = int(line.hicache_size * 1e9) or None
    if line.model is None:
        return asked, fault("model", "the launch line names none", "add --model-path")
    if not on_host:
        return 0, note("model", "no host tier", "--enable-hierarchical-cache adds it")
    try:
        config = load(find(line.model))
        model = shape_of(config, line.dtype, line.kv_cache_dtype)
        plan = Plan.of(architecture(config), model, line, draft=draft_of(line))
    except (ModelConfigError, PlanError) as error:
        return asked, note("model", str(error))
    said = dict(plan.host.rows(line.ranks))
    return plan.host.bytes, ok("model", f"{plan.name}: {said['room on a rank']}")


def _root() -> Path | None:
    """The folder that the engine would be imported from."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent
