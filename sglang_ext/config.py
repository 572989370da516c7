"""Configuration of the extension, read once."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sglang_ext.errors import StartupError

BACKEND = "swa_hicache"
"""Name for ``--radix-cache-backend``."""
TOGGLE = "SGLANG_EXT_SWA_HICACHE"
CHECKPOINT_TOKENS = "SGLANG_EXT_CHECKPOINT_TOKENS"
COPIES = "SGLANG_EXT_COPIES"
RETENTION = "SGLANG_EXT_RETENTION"
PINNED_SHARE = "SGLANG_EXT_PINNED_SHARE"
REPORT_DELAY = "SGLANG_EXT_TEST_REPORT_DELAY_MS"
SLOWDOWN = "SGLANG_EXT_TEST_BACKUP_SLOWDOWN"
STEP_TRACE = "SGLANG_EXT_TEST_STEP_TRACE"

_PREFIX = "SGLANG_EXT_"


class ExtConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the environment says. ``VARIABLES`` says what each field means."""

    selected: bool = False
    checkpoint_tokens: int | None = None
    copies: str | None = None
    retention: str = "learned"
    pinned_share: float = 0.25
    report_delay_ms: float = 0.0
    backup_slowdown: float = 1.0
    step_trace: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable.

    Attributes:
        field: of ``ExtConfig``. A variable that is empty or not set leaves the field's default.
        type: what msgspec makes the field's value of the text with.
        allowed: the values of that type.
        unset: what happens without the variable, where the default does not say it.
    """

    name: str
    field: str
    type: Any
    allowed: str
    meaning: str
    unset: str = ""


_FINITE = sys.float_info.max
VARIABLES = (
    Variable(
        TOGGLE,
        "selected",
        bool,
        "1 or 0",
        "Selects the cache and its host tier without any flag.",
    ),
    Variable(
        CHECKPOINT_TOKENS,
        "checkpoint_tokens",
        Annotated[int, Meta(ge=0)],
        "a whole number of at least 0",
        "`K`: tokens between the windows that are always kept inside a prompt; 0 keeps none there.",
        "derived from the model: 4,096 with gpt-oss, more where windows are large",
    ),
    Variable(
        COPIES,
        "copies",
        Literal["engine", "kernels"],
        "engine or kernels",
        "Who copies between device and host: SGLang, or the kernels of this project.",
        "`engine` on CUDA, `kernels` on a CPU",
    ),
    Variable(
        RETENTION,
        "retention",
        Literal["learned", "lru"],
        "learned or lru",
        "What `--radix-eviction-policy lru` means: what is not expected back goes first, as far as "
        "that finds more, or always what was least recently used.",
    ),
    Variable(
        PINNED_SHARE,
        "pinned_share",
        Annotated[float, Meta(ge=0, le=1)],
        "a number from 0 to 1",
        "How much of the host pinned prefixes may take; more is refused.",
    ),
    Variable(
        REPORT_DELAY,
        "report_delay_ms",
        Annotated[float, Meta(ge=0, le=_FINITE)],
        "a number of at least 0",
        "For tests on a CPU: milliseconds between the end of a copy and its report.",
    ),
    Variable(
        SLOWDOWN,
        "backup_slowdown",
        Annotated[float, Meta(ge=1, le=_FINITE)],
        "a number of at least 1",
        "For tests on a CPU: a backup takes this many times as long as its copy.",
    ),
    Variable(
        STEP_TRACE,
        "step_trace",
        str,
        "the name of a file",
        "For tests: the first rank writes the time of every scheduler step to this file.",
        "nothing is written",
    ),
)


def from_environment(environment: Mapping[str, str] | None = None) -> ExtConfig:
    """Parse ``SGLANG_EXT_*``.

    Raises:
        StartupError: an unknown variable, or a value that is not allowed.
    """
    if environment is None:
        environment = os.environ
    known = [variable.name for variable in VARIABLES]
    unknown = sorted(k for k in environment if k.startswith(_PREFIX) and k not in known)
    if unknown:
        raise StartupError(f"unknown environment variable {unknown[0]}; known: {', '.join(known)}")
    given = {}
    for variable in VARIABLES:
        if text := environment.get(variable.name, "").strip():
            given[variable.field] = _parsed(variable, text)
    return ExtConfig(**given)


def _parsed(variable: Variable, text: str) -> Any:
    try:
        # not strict: numbers and booleans are made of text
        return msgspec.convert(text, variable.type, strict=False)
    except msgspec.ValidationError:
        raise StartupError(
            f"{variable.name}={text!r} is not allowed; use {variable.allowed}"
        ) from None
