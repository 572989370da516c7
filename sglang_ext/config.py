"""Configuration of the extension, read once."""

import os
from collections.abc import Mapping

import msgspec

from sglang_ext.errors import StartupError

BACKEND = "swa_hicache"
"""Name for ``--radix-cache-backend``."""
TOGGLE = "SGLANG_EXT_SWA_HICACHE"
"""Environment variable that selects the backend and the host tier by itself."""

_PREFIX = "SGLANG_EXT_"
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False, "": False}


class ExtConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the environment says.

    Attributes:
        selected: use our cache and its host tier without any command line flag.
    """

    selected: bool = False


def from_environment(environment: Mapping[str, str] | None = None) -> ExtConfig:
    """Parse ``SGLANG_EXT_*``.

    Raises:
        StartupError: an unknown variable, or a value that is not allowed.
    """
    if environment is None:
        environment = os.environ
    unknown = sorted(k for k in environment if k.startswith(_PREFIX) and k != TOGGLE)
    if unknown:
        raise StartupError(f"unknown environment variable {unknown[0]}; known: {TOGGLE}")
    value = environment.get(TOGGLE, "").strip().lower()
    if value not in _BOOLEANS:
        raise StartupError(f"{TOGGLE}={value!r} is not allowed; use 1 or 0")
    return ExtConfig(selected=_BOOLEANS[value])
