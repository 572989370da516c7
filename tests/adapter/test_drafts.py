"""Drafts with KV of their own: it is part of the page that it belongs to, in every tier."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.adapter import draft_pools, drafts, stacks
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW
from tests.fixtures.zygote import Zygote

GEOMETRY = Geometry(16, 40, overlap=1)
BUGS = ("drafts_are_not_copied", "drafts_are_not_loaded", "drafts_stay_when_a_page_moves",
        "drafts_are_not_stored", "drafts_are_not_paid_for")  # fmt: skip


def test_all_of_a_page_goes_to_every_tier_and_back(zygote: Zygote) -> None:
    lines = zygote.lines("tests.adapter.draft_views")
    assert len(lines) == 24
    assert all(line.endswith("ok") for line in lines), lines


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(zygote: Zygote, bug: str) -> None:
    lines = zygote.lines("tests.adapter.draft_views", bug)
    plain = [line for line in lines if line.startswith("none ")]
    assert plain and all(line.endswith("ok") for line in plain), lines
    assert any("AssertionError" in line for line in lines), lines


def pool(layers: int, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32) -> Any:
    info = SimpleNamespace(
        buffers=SimpleNamespace(k=[None] * layers),
        head_num=heads,
        head_dim=width,
        v_head_dim=width,
        dtype=dtype,
    )
    return SimpleNamespace(
        layer_num=layers,
        dtype=dtype,
        get_device_pool_infos=lambda: [SimpleNamespace(buffer_info=info)],
    )


def model(full: int = 2, window: int = 3) -> Any:
    mapping = {layer: (layer, False) for layer in range(full)}
    mapping |= {full + layer: (layer, True) for layer in range(window)}
    return SimpleNamespace(
        full_kv_pool=pool(full), swa_kv_pool=pool(window), layers_mapping=mapping
    )


def window_layers(count: int, **shape: Any) -> list[drafts.DraftLayers]:
    return [drafts.DraftLayers(pool(1, **shape), WINDOW, is_packed=True) for _ in range(count)]


def test_what_the_engine_packs_lies_beside_the_models_layers() -> None:
    target, packed = model(), window_layers(3)
    found = stacks.stacks_of(target, packed)
    assert [(stack.component, stack.layers, stack.plane) for stack in found] == [
        (FULL, 2, 0),
        (WINDOW, 6, 0),
    ]
    row = 2 * 8 * 4 * 16
    assert stacks.bytes_by_plane(found, GEOMETRY) == ((2 * row, 2 * row), (6 * row, 6 * row))


def test_other_shapes_have_planes_of_their_own() -> None:
    found = stacks.stacks_of(
        model(),
        [
            drafts.DraftLayers(pool(1, heads=3), FULL, is_packed=False),
            *window_layers(2, dtype=torch.bfloat16),
        ],
    )
    assert [(stack.component, stack.layers, stack.plane) for stack in found] == [
        (FULL, 2, 0),
        (WINDOW, 3, 0),
        (FULL, 1, 2),
        (WINDOW, 2, 4),
    ]
    row = 8 * 4 * 16
    full, window = stacks.bytes_by_plane(found, GEOMETRY)
    assert full == (4 * row, 4 * row, 3 * row, 3 * row, 0, 0)
    assert window == (6 * row, 6 * row, 0, 0, 2 * row, 2 * row)


def test_a_depth_is_loaded_with_its_layer_of_the_model_and_none_after_the_last() -> None:
    target = model(full=1, window=2)
    draft = drafts.DraftLayers(pool(2, heads=1), FULL, is_packed=False)
    found = stacks.stacks_of(target, [*window_layers(5), draft])
    assert stacks.schedule_of(target, found) == [
        [(FULL, 0), (WINDOW, 2), (2, 0)],
        [(WINDOW, 0), (WINDOW, 3), (2, 1)],
        [(WINDOW, 1), (WINDOW, 4), (WINDOW, 5), (WINDOW, 6)],
    ]


def test_drafts_of_several_shapes_are_refused() -> None:
    several = [drafts.DraftLayers(pool(1, heads=n), FULL, is_packed=False) for n in (1, 3)]
    with pytest.raises(StartupError, match="drafts of different shapes are not supported"):
        stacks.stacks_of(model(), several)


def test_drafts_of_a_model_without_full_attention_are_refused_with_what_to_use() -> None:
    with pytest.raises(StartupError, match="use --speculative-algorithm NGRAM"):
        stacks.stacks_of(model(full=0), window_layers(1))


def test_a_pool_of_another_kind_is_refused_by_its_name() -> None:
    other = SimpleNamespace(layer_num=1)
    params: Any = SimpleNamespace(mtp_draft_device_pools=(), sidecar_draft_device_pools=(other,))
    with pytest.raises(StartupError, match="type SimpleNamespace are not supported; allowed: MHA"):
        drafts.layers(params)


def test_the_engine_is_told_nothing_of_drafts_that_our_cache_has() -> None:
    asked: list[Any] = []

    def original(*, tree_cache: Any, draft_plan: Any) -> None:
        asked.append(tree_cache)

    ours: Any = SwaHiCache.__new__(SwaHiCache)
    plan: Any = object()
    for cache in (ours, "stock"):
        draft_pools.register(original, tree_cache=cache, draft_plan=plan)
    assert asked == ["stock"]
