"""Keys in storage are byte for byte those of the engine."""

from array import array

import numpy as np
import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_ext.core.storage.keys import chain, namespace_seed
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.paths import pages_of


@pytest.mark.parametrize(("device_page", "per_page"), [(64, 1), (16, 1), (4, 4), (1, 16)])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize(
    "namespace", [(None, None), ("lora", None), (None, "salt"), ("lora", "salt"), ("", "é")]
)
def test_the_chain_is_stocks(
    device_page: int, per_page: int, namespace: tuple[str | None, str | None], overlap: int
) -> None:
    """With tokens of four bytes, and placeholders of images that do not fit them; of tokens, and
    of pairs of them."""
    geometry = Geometry(device_page, 100, overlap=overlap)
    assert geometry.slots_per_page == per_page
    rng = np.random.default_rng(device_page)
    tokens = rng.integers(0, 1 << 17, 5 * device_page * per_page + overlap)
    tokens[-1] = (1 << 40) + 3
    tokens[3 * device_page * per_page] = (1 << 32) - 1
    extra_key, salt = namespace
    key = RadixKey(array("q", tokens), extra_key, is_bigram=overlap > 0, cache_salt=salt)
    theirs = get_storage_hash_str(key, None, page_size=device_page)
    pages = pages_of(tokens, 5, geometry)
    first = chain(namespace_seed(namespace), pages[:2], geometry)
    ours = first + chain(first[-1], pages[2:], geometry)
    assert [key.hex() for key in ours] == theirs
