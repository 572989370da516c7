"""How the engine's pages are called in KV events: what routers know them by.

The hash of a page is the first eight bytes of a SHA-256 chain over the pages in front of it and
what its positions are of: a token, or a pair of tokens with drafts that have KV of the next one.
The engine's functions compute it, so a page has the hash that the engine's own cache would give
it.
"""

import hashlib
from array import array
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed, namespaced_block_hash
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_hash_str

from sglang_ext.core.compiled.constants import PAD
from sglang_ext.core.table.columns import Rows
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.table import PageTable
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.events import KvEventLoraNames

_DIGEST_BYTES = 32
_NEVER = -1


def prepare() -> None:
    """Have the engine's hash function compiled, before a scheduler step would wait for that.

    Raises:
        StartupError: it cannot be.
    """
    try:
        get_hash_str(array("q", [0]), None, 1)
    except RuntimeError as error:
        raise StartupError(
            f"--kv-events-config needs the engine's hash function, which did not load: {error}"
        ) from error


def units(names: Pages, geometry: Geometry, *, pairs: bool) -> list[Any]:
    """What each position of pages is of, as events tell it.

    Args:
        names: (n, name_tokens) of the pages.
        pairs: see ``Namings``.
    """
    if pairs:
        return [
            tuple(pair) for pair in sliding_window_view(names, 2, axis=1).reshape(-1, 2).tolist()
        ]
    tokens: list[Any] = names[:, : geometry.page_tokens].reshape(-1).tolist()
    return tokens


class Naming(NamedTuple):
    """What the pages of a namespace have in common in KV events.

    Attributes:
        start: digest in front of the first page, in hexadecimal; None for none.
        space: what every hash is hashed with once more; None for nothing.
        cache_salt: of the requests.
        lora_name: of their adapter, if it is known.
    """

    start: str | None
    space: bytes | None
    cache_salt: str | None
    lora_name: str | None


class Namings:
    """How pages are called by the namespace they are in.

    Args:
        lora_names: names of adapters by extra key; the scheduler fills it.
        dynamo_format: equal tokens of different extra keys have different hashes. In the
            engine's own format only salts and named adapters make that difference.
        pairs: a position is told as a pair, its token and the next one. Drafts whose KV is of both
            may still be told as the engine does: not all of them are.
    """

    def __init__(
        self, lora_names: "KvEventLoraNames", *, dynamo_format: bool, pairs: bool = False
    ) -> None:
        self.pairs = pairs
        self._lora_names = lora_names
        self._dynamo_format = dynamo_format

    def of(self, namespace: Hashable) -> Naming:
        """Of (extra key, salt), or None for the namespace without a name."""
        extra_key, salt = namespace if isinstance(namespace, tuple) else (None, None)
        start = None
        if salt is not None:
            start = hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).hexdigest()
        if self._dynamo_format:
            space = kv_event_namespace_seed(extra_key=extra_key, cache_salt=salt)
            return Naming(start, space, salt, self._lora_names.resolve(extra_key))
        name = self._lora_names.get(extra_key)
        space = kv_event_namespace_seed(
            extra_key=None if name is None else extra_key, cache_salt=None
        )
        return Naming(start, space, salt, name)


class BlockHashes:
    """Hashes of the engine's pages of rows: they stay what they were when a row is forgotten,
    until it is asked for again as another page.

    Attributes:
        hashes: (rows, slots_per_page) int64, in the order of the pages.
        counts: (rows,) int32, how many of them a row has; fewer than others for a tail.
        depth: (rows,) int32, as in the table.
    """

    def __init__(self, table: PageTable, namings: Namings) -> None:
        rows, per_page = table.capacity, table.geometry.slots_per_page
        self.hashes: NDArray[np.int64] = np.zeros((rows, per_page), dtype=np.int64)
        self.counts: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self.depth: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self._ends: NDArray[np.uint8] = np.zeros((rows, _DIGEST_BYTES), dtype=np.uint8)
        self._generation: NDArray[np.int32] = np.full(rows, _NEVER, dtype=np.int32)
        self._table = table
        self._namings = namings

    def are_known(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows still are the pages that their hashes are of."""
        known: NDArray[np.bool_] = self._generation[rows] == self._table.generation[rows]
        return known

    def find(self, rows: Rows) -> None:
        """Have the hashes of rows of the table, and of the rows in front of them.

        Args:
            rows: in the order of their depth.
        """
        rows = rows[~self.are_known(rows)]
        while len(rows):
            self._chain(self._table.path(int(rows[-1])))
            rows = rows[~self.are_known(rows)]

    def of(self, rows: Rows) -> list[int]:
        """Hashes of the pages of rows, in the order of the rows."""
        per_page = self.hashes.shape[1]
        real = np.arange(per_page) < self.counts[rows, None]
        of_rows: list[int] = self.hashes[rows][real].tolist()
        return of_rows

    def naming(self, row: int) -> Naming:
        """How pages are called where a row is."""
        return self._namings.of(self._table.namespace(self._table.path(row)))

    def _chain(self, path: Rows) -> None:
        """Hash the rest of a path: the hashes of a row are known only if those above it are."""
        table = self._table
        known = int(np.count_nonzero(self.are_known(path)))
        naming = self._namings.of(table.namespace(path))
        before = self._ends[path[known - 1]].tobytes().hex() if known else naming.start
        rows = path[known:]
        geometry = table.geometry
        page, per_page = geometry.device_page, geometry.slots_per_page
        named = np.count_nonzero(table.tokens[rows] != PAD, axis=1) - geometry.overlap
        tokens = table.prompt(rows)
        if not self._namings.pairs:
            tokens = tokens[: len(rows) * geometry.page_tokens]
        # what a tail is filled up with is no token; nothing goes on behind it
        tokens[tokens == PAD] = 0
        key = RadixKey(array("q", tokens.tobytes()), is_bigram=self._namings.pairs)
        digests = np.frombuffer(
            bytes.fromhex("".join(get_hash_str(key, before, page))), dtype=np.uint8
        ).reshape(len(rows), per_page, _DIGEST_BYTES)
        hashes = digests[:, :, :8].copy().view(">i8")[:, :, 0].astype(np.int64)
        if naming.space is not None:
            of_space = [
                namespaced_block_hash(h, namespace_seed=naming.space)
                for h in hashes.reshape(-1).tolist()
            ]
            hashes = np.array(of_space, dtype=np.int64).reshape(hashes.shape)
        self.hashes[rows] = hashes
        self.counts[rows] = named // page
        self.depth[rows] = table.depth[rows]
        self._ends[rows] = digests[:, -1]
        self._generation[rows] = table.generation[rows]
