"""Models whose pages are rows of bytes: the engine's pools, and what is read there of tokens."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.adapter.deepseek_v4 import (
    PAGE,
    device_pool,
    draft_pool,
    draft_rings,
    paged_v41_pool,
    replayed_pool,
)
from tests.adapter.latent import full_attention_pool, latent_pool

RING = 8
"""States of C4 of a page."""


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Where the first tokens of a request lie.

    Attributes:
        row: their full-attention slots.
        peers: window slots of all full-attention slots, if there are any.
        tags: of each token, its whole prefix; of the token behind the last one too, if it is known.
        start: first token whose full attention counts.
        window: first whose window does.
    """

    row: torch.Tensor
    peers: torch.Tensor
    tags: torch.Tensor
    start: int
    window: int


Plane = tuple[str, torch.Tensor, torch.Tensor, int, torch.Tensor]
"""For a reader; buffer of a layer, slots in it, slots of a row of it, tag of each slot."""
Planes = Callable[[Any, Places], Iterator[Plane]]


def planes_of_deepseek_v4(pool: Any, at: Places) -> Iterator[Plane]:
    """What each layer reads of tokens."""
    count = len(at.row)
    swa = at.peers[at.row[at.window :]]
    # a page has a state for each place of its ring: of its last tokens
    ring = torch.arange(at.window, count)
    ring = ring[(ring % PAGE >= PAGE - RING) | (ring >= count - RING)]
    of_ring = at.peers[at.row[ring]]
    for layer, ratio in enumerate(pool.compression_ratios):
        where = f"layer {layer}: "
        if pool.request_window is None:
            tags = at.tags[at.window : count]
            yield where + "window", pool.get_swa_key_buffer_radix(layer), swa, PAGE, tags
        if ratio:
            last = torch.arange(at.start, count)
            last = last[(last + 1) % ratio == 0]
            slots, of = at.row[last] // ratio, at.tags[last]
            yield f"{where}C{ratio}", pool.get_extra_key_buffer(layer), slots, PAGE // ratio, of
            if ratio != 128:
                index = pool.get_index_k_with_scale_buffer(layer)
                yield where + "index", index, slots, pool.index_pools[ratio].page_size, of
        if ratio == 4:
            for name in ("attention", "indexer"):
                states = getattr(pool, f"get_{name}_compress_states")(layer)
                places = states.translate_from_swa_loc_to_state_loc(of_ring.clone())
                buffer = states.kv_score_buffer.kv_score
                yield f"{where}{name} state", buffer, places, 1, at.tags[ring]


def planes_of_keys_and_values(pool: Any, at: Places) -> Iterator[Plane]:
    """What each layer reads of tokens."""
    for layer in range(pool.layer_num):
        for name, buffer in zip(("K", "V"), pool.get_kv_buffer(layer), strict=True):
            yield (
                f"layer {layer}: {name}",
                buffer,
                at.row[at.start :],
                1,
                at.tags[at.start : len(at.row)],
            )


def planes_of_latent(pool: Any, at: Places) -> Iterator[Plane]:
    """What each layer reads of tokens."""
    for layer, (_, is_window) in sorted(pool.layers_mapping.items()):
        first = at.window if is_window else at.start
        slots = at.peers[at.row[first:]] if is_window else at.row[first:]
        name = f"layer {layer}: {'window' if is_window else 'full attention'}"
        yield name, pool.get_key_buffer(layer), slots, 1, at.tags[first : len(at.row)]


def planes_of_drafts(pool: Any, at: Places, overlap: int) -> Iterator[Plane]:
    """What each layer of a draft reads of tokens.

    Args:
        overlap: 1 where its KV at a position is of the next token as well. What is not known yet
            is not there.
    """
    tags = at.tags[at.window + overlap :][: len(at.row) - at.window]
    slots = at.peers[at.row[at.window :]][: len(tags)]
    for layer in range(len(pool.compression_ratios)):
        yield f"draft {layer}", pool.get_swa_key_buffer_radix(layer), slots, PAGE, tags


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """Pools, and what is read there.

    Attributes:
        pools: makes those of the engine, by tokens with full-attention and with window KV.
        drafts: the same for those of its drafts, by tokens with window KV.
        algorithm: of the drafts, by the engine's name.
        overlap: see ``planes_of_drafts``.
    """

    pools: Callable[[int, int], Any]
    planes: Planes
    drafts: Callable[[int], tuple[Any, ...]] = lambda _: ()
    algorithm: str | None = None
    overlap: int = 0
    has_windows: bool = True


def mtp_layers(window_tokens: int) -> tuple[Any, ...]:
    """Two drafts, each a model for the engine."""
    return draft_pool(window_tokens), draft_pool(window_tokens)


def dspark_layers(window_tokens: int) -> tuple[Any, ...]:
    """One draft with layers of its own."""
    return (draft_pool(window_tokens, layers=3),)


_V4 = Model(device_pool, planes_of_deepseek_v4)
MODELS = {
    "deepseek-v4": _V4,
    "deepseek-v4-mtp": dataclasses.replace(_V4, drafts=mtp_layers, algorithm="EAGLE", overlap=1),
    "deepseek-v4-dspark": dataclasses.replace(_V4, drafts=dspark_layers, algorithm="DSPARK"),
    "deepseek-v4.1": Model(replayed_pool, planes_of_deepseek_v4, has_windows=False),
    "deepseek-v4.1-dspark": Model(
        replayed_pool,
        planes_of_deepseek_v4,
        drafts=draft_rings,
        algorithm="DSPARK",
        has_windows=False,
    ),
    "deepseek-v4.1-paged": Model(paged_v41_pool, planes_of_deepseek_v4),
    "latent": Model(latent_pool, planes_of_latent),
    "full-attention": Model(full_attention_pool, planes_of_keys_and_values, has_windows=False),
}
