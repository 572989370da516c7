"""How a model watches what it is a model of."""

import functools
from collections.abc import Callable
from typing import Any


class ModelError(AssertionError):
    """The index did what the model does not allow."""


def require(condition: bool, message: str) -> None:
    """Raises ModelError: it does not hold."""
    if not condition:
        raise ModelError(message)


def around(owner: Any, name: str, watch: Callable[..., Any], *first: Any) -> None:
    """Let ``watch`` be called in place of a method, with ``first`` and the method in front of its
    arguments."""
    setattr(owner, name, functools.partial(watch, *first, getattr(owner, name)))
