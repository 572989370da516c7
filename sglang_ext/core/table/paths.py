"""Pages that are not whole."""

import numpy as np
from numpy.typing import NDArray

from sglang_ext.core.compiled.constants import PAD

Page = NDArray[np.int64]


def filled_up(tokens: Page, length: int) -> Page:
    """(length,) tokens, and PAD behind them."""
    page = np.full(length, PAD, dtype=np.int64)
    page[: len(tokens)] = tokens
    return page
