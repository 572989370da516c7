"""Pipeline stages: each has a cache of its own layers, and all of them hold the same table.

A stage gets what arrives from the stage before it, and forms the batches for itself. What it finds
in its cache decides on them, so the tables must not differ by a page.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


def refuse_unlike(params: "CacheInitParams", sizes: Sequence[int]) -> None:
    """Check that the stages have room for equally many pages. A collective.

    Args:
        sizes: what the tables depend on, of this rank.

    Raises:
        StartupError: a stage has others; on all of them.
    """
    stages = RankAgreement([params.pp_cache_group])
    both = stages.minimum([*sizes, *(-size for size in sizes)])
    least, most = both[: len(sizes)], [-size for size in both[len(sizes) :]]
    if least != most:
        raise StartupError(
            f"--pp-size {params.pp_size}: the stages have unlike layers, and room for {least} to "
            f"{most} pages or bytes of them; use a --pp-size that gives each stage as many "
            f"sliding-window and full-attention layers, --tp-size, or {OWN_CACHE}"
        )
