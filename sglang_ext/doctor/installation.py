"""Is the engine the one that we fit, and does it run what we add to it?"""

import importlib.metadata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sglang_ext.config import BACKEND, TOGGLE, from_environment
from sglang_ext.doctor.finding import Finding, fault, note, ok
from sglang_ext.errors import StartupError
from sglang_ext.patches.patch_set import PatchError, series

_ALLOWED = "SGLANG_PLUGINS"
_SHOWN = ("sglang", "torch", "triton", "sglang-kernel", "numba", "numpy", "sglang-ext")
"""Distributions whose versions a report of a fault needs."""


class Engine(Protocol):
    """What doctor asks an engine; see ``adapter.installed``."""

    def version_problem(self) -> str | None:
        """Why its version does not fit, or None."""

    def plugins(self) -> Mapping[str, str | None]:
        """Entry points of plugins by name: why one cannot be loaded, or None."""
        ...

    def hooks_problem(self) -> str | None:
        """Why a hook did not take effect, or None."""

    def signatures_problem(self) -> str | None:
        """Where its functions differ from what we call, or None."""

    def shown_patches(self) -> Collection[str]:
        """Names of the patches that it shows when it runs."""
        ...

    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        ...

    def line_problems(self, words: Sequence[str], *, selected: bool) -> Sequence[str]:
        """What of a launch line is not understood or not supported."""
        ...

    def storage_settings(self, text: str | None) -> Mapping[str, Any]:
        """What the settings of a storage backend say; ValueError if they cannot be read."""
        ...


def check(engine: Engine, environment: Mapping[str, str], root: Path | None) -> Iterator[Finding]:
    """Args:
    root: the folder that holds the engine's package; None if there is none.
    """
    yield ok("versions", ", ".join(f"{name} {_version(name)}" for name in _SHOWN))
    yield _configuration(environment)
    problem = engine.version_problem()
    if problem is not None:
        yield fault("engine", problem, "install the version that is named first")
        return
    yield ok("engine", f"sglang {_version('sglang')}")
    yield _plugins(engine, environment)
    if excluded(environment) is None:
        hooks = engine.hooks_problem()
        if hooks is None:
            yield ok("hooks", "all in effect, or replaced by patches")
        else:
            advice = "another plugin or a changed engine is in its way; see its name above"
            yield fault("hooks", hooks, advice)
    differences = engine.signatures_problem()
    if differences is None:
        yield ok("signatures", "the engine takes what it is given")
    else:
        advice = "install the engine as it was released, without changes"
        yield fault("signatures", differences, advice)
    if root is not None:
        yield from patches(root, engine.shown_patches())


def excluded(environment: Mapping[str, str]) -> str | None:
    """What ``SGLANG_PLUGINS`` lets through, if we are not among it."""
    allowed = environment.get(_ALLOWED, "")
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    return allowed if names and BACKEND not in names else None


def _configuration(environment: Mapping[str, str]) -> Finding:
    try:
        settings = from_environment(environment)
    except StartupError as error:
        return fault("variables", str(error), "mend or unset it")
    return ok("variables", f"{TOGGLE}={int(settings.selected)}")


def _plugins(engine: Engine, environment: Mapping[str, str]) -> Finding:
    plugins = engine.plugins()
    if BACKEND not in plugins:
        return fault("entry points", f"{BACKEND} is not installed", "pip install sglang-ext")
    if (reason := plugins[BACKEND]) is not None:
        return fault("entry points", f"{BACKEND} does not load: {reason}", "install it again")
    if (allowed := excluded(environment)) is not None:
        found = f"{_ALLOWED}={allowed} keeps {BACKEND} from loading"
        return fault("entry points", found, f"add {BACKEND} to {_ALLOWED}, or unset it")
    broken = [name for name, reason in plugins.items() if reason is not None]
    if broken:
        return note("entry points", f"{BACKEND} loads; {', '.join(broken)} does not")
    return ok("entry points", f"{', '.join(plugins)} load")


def patches(root: Path, shown: Collection[str]) -> Iterator[Finding]:
    """What of the series is in the files of an engine, beside what it shows when it runs.

    Args:
        root: the folder that holds its package.
        shown: names of patches.
    """
    there = []
    for patch in series():
        try:
            if patch.is_applied(root):
                there.append(patch.name)
        except PatchError as reason:
            if patch.name in shown:
                advice = "revert it with the release that applied it, or install sglang again"
                yield fault("patches", f"{patch.name} is stale: {reason}", advice)
            else:
                yield note("patches", f"{reason}; a hook does what {patch.name} would")
    yield ok("patches", f"applied: {', '.join(there) or 'none'}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
