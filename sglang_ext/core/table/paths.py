"""Prompts as pages, whole and not whole."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry

Page = NDArray[np.int64]
_TOKEN_BYTES = 8
_NO_TOKENS: Page = np.empty(0, dtype=np.int64)


def pages_of(tokens: Any, count: int, geometry: Geometry) -> Pages:
    """(count, name_tokens) names of the first pages of a prompt; a view if they do not overlap.

    Args:
        tokens: of 64 bits each, in one piece.
    """
    page, shape = geometry.page_tokens, (count, geometry.name_tokens)
    if count == 0:
        return np.empty(shape, dtype=np.int64)
    strides = page * _TOKEN_BYTES, _TOKEN_BYTES
    return np.ascontiguousarray(np.ndarray(shape, np.int64, tokens, 0, strides))


def behind_pages(tokens: Any, length: int, geometry: Geometry) -> Page:
    """What the first ``length`` tokens name behind their whole pages; a view."""
    start = geometry.whole_pages_in(length) * geometry.page_tokens
    if geometry.named(length) > start:
        return np.frombuffer(tokens, np.int64, length - start, start * _TOKEN_BYTES)
    return _NO_TOKENS


def filled_up(tokens: Page, length: int) -> Page:
    """(length,) tokens, and PAD behind them."""
    page = np.full(length, PAD, dtype=np.int64)
    page[: len(tokens)] = tokens
    return page
