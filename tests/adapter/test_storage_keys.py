"""Keys in storage are byte for byte those of the engine."""

import numpy as np
import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_ext.core.storage.keys import chain, namespace_seed


@pytest.mark.parametrize(("device_page", "per_page"), [(64, 1), (16, 1), (4, 4), (1, 16)])
@pytest.mark.parametrize(
    "namespace", [(None, None), ("lora", None), (None, "salt"), ("lora", "salt"), ("", "é")]
)
def test_the_chain_is_stocks(
    device_page: int, per_page: int, namespace: tuple[str | None, str | None]
) -> None:
    """With tokens of four bytes, and placeholders of images that do not fit them."""
    rng = np.random.default_rng(device_page)
    tokens = rng.integers(0, 1 << 17, 5 * device_page * per_page)
    tokens[-1] = (1 << 40) + 3
    tokens[3 * device_page * per_page] = (1 << 32) - 1
    key = RadixKey(tokens.tolist(), extra_key=namespace[0], cache_salt=namespace[1])
    theirs = get_storage_hash_str(key, None, page_size=device_page)
    pages = tokens.reshape(5, -1)
    first = chain(namespace_seed(namespace), pages[:2], per_page)
    ours = first + chain(first[-1], pages[2:], per_page)
    assert [key.hex() for key in ours] == theirs
