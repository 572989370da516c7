"""Configuration of the extension, read once."""

import os
from collections.abc import Mapping

import msgspec

from sglang_ext.errors import StartupError

BACKEND = "swa_hicache"
"""Name for ``--radix-cache-backend``."""
TOGGLE = "SGLANG_EXT_SWA_HICACHE"
"""Environment variable that selects the backend and the host tier by itself."""

CHECKPOINT_TOKENS = "SGLANG_EXT_CHECKPOINT_TOKENS"
"""Tokens between the sliding windows that are kept inside a prompt; 0 keeps none there."""

COPIES = "SGLANG_EXT_COPIES"
"""Who copies between device and host: ``engine``, or ``kernels`` of this project."""

REPORT_DELAY = "SGLANG_EXT_TEST_REPORT_DELAY_MS"
"""For tests: milliseconds between the end of a copy and its report."""
SLOWDOWN = "SGLANG_EXT_TEST_BACKUP_SLOWDOWN"
"""For tests: a backup takes this many times as long as its copy."""
STEP_TRACE = "SGLANG_EXT_TEST_STEP_TRACE"
"""For tests: file to which the first rank writes the time of every scheduler step."""

_PREFIX = "SGLANG_EXT_"
_KNOWN = (TOGGLE, CHECKPOINT_TOKENS, COPIES, REPORT_DELAY, SLOWDOWN, STEP_TRACE)
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False, "": False}


class ExtConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the environment says.

    Attributes:
        selected: use our cache and its host tier without any command line flag.
        checkpoint_tokens: see CHECKPOINT_TOKENS; None derives it from the model.
        copies: see COPIES; None is what fits the device.
        report_delay_ms: see REPORT_DELAY.
        backup_slowdown: see SLOWDOWN.
        step_trace: see STEP_TRACE; None writes nothing.
    """

    selected: bool = False
    checkpoint_tokens: int | None = None
    copies: str | None = None
    report_delay_ms: float = 0.0
    backup_slowdown: float = 1.0
    step_trace: str | None = None


def from_environment(environment: Mapping[str, str] | None = None) -> ExtConfig:
    """Parse ``SGLANG_EXT_*``.

    Raises:
        StartupError: an unknown variable, or a value that is not allowed.
    """
    if environment is None:
        environment = os.environ
    unknown = sorted(k for k in environment if k.startswith(_PREFIX) and k not in _KNOWN)
    if unknown:
        raise StartupError(f"unknown environment variable {unknown[0]}; known: {', '.join(_KNOWN)}")
    value = environment.get(TOGGLE, "").strip().lower()
    if value not in _BOOLEANS:
        raise StartupError(f"{TOGGLE}={value!r} is not allowed; use 1 or 0")
    copies = environment.get(COPIES, "").strip() or None
    if copies not in (None, "engine", "kernels"):
        raise StartupError(f"{COPIES}={copies!r} is not allowed; use engine or kernels")
    return ExtConfig(
        selected=_BOOLEANS[value],
        checkpoint_tokens=_tokens(environment, CHECKPOINT_TOKENS),
        copies=copies,
        report_delay_ms=_number(environment, REPORT_DELAY, 0.0),
        backup_slowdown=_number(environment, SLOWDOWN, 1.0),
        step_trace=environment.get(STEP_TRACE) or None,
    )


def _tokens(environment: Mapping[str, str], key: str) -> int | None:
    """A number of tokens, None where the variable is not set."""
    text = environment.get(key, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise StartupError(f"{key}={text!r} is not allowed; use a whole number of at least 0")
    return int(text) if text else None


def _number(environment: Mapping[str, str], key: str, least: float) -> float:
    """A number of at least ``least``, which is also what an unset variable means."""
    text = environment.get(key, "").strip()
    try:
        value = float(text) if text else least
    except ValueError:
        value = -1.0
    if not least <= value < float("inf"):
        raise StartupError(f"{key}={text!r} is not allowed; use a number of at least {least:g}")
    return value
