"""Latent attention with windows: what a page is goes to every tier and back; other forms are
refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.adapter import factory
from sglang_ext.adapter.latent import LatentKv
from sglang_ext.adapter.options import refuse_model
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.planning.latent import LatentShape
from tests.adapter.test_deepseek_v4 import context
from tests.fixtures.zygote import Zygote

TRAFFIC = "tests.adapter.deepseek_v4_traffic"


def test_conversations_read_what_they_wrote_in_every_tier_and_after_a_restart(
    zygote: Zygote, tmp_path: Path
) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path), "--model", "latent")
    first, second = map(json.loads, printed[-2:])
    for server in (first, second):
        assert server["verified"] >= server["from_device"] + server["from_host"]
    for what in ("backed_up", "loaded", "demoted", "persisted"):
        assert first["counters"][f"{what}_pages"] > 0, what
    assert first["counters"]["loaded_window_pages"] > 0
    assert first["from_device"] > 0 < first["from_host"]
    assert second["counters"]["prefetched_pages"] > 0
    assert second["from_host"] > 0.8 * second["prompt"]
    assert first["window_cost"] > 0


@pytest.mark.parametrize("bug", ["the_last_layer_is_not_loaded", "windows_are_not_loaded"])
def test_rows_that_were_left_behind_are_found(zygote: Zygote, tmp_path: Path, bug: str) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path), bug, "--model", "latent")
    assert printed[-1].endswith('window"'), printed


@pytest.fixture
def pool() -> Any:
    """The engine's class, with what tells its forms apart."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    made: Any = SWAKVPool.__new__(SWAKVPool)
    made.full_kv_pool, made.swa_kv_pool = (
        MLATokenToKVPool.__new__(MLATokenToKVPool) for _ in range(2)
    )
    for component, layers, width in ((made.full_kv_pool, 1, 576), (made.swa_kv_pool, 2, 320)):
        component.kv_buffer = [torch.zeros(5 * 16, 1, width, dtype=torch.bfloat16)] * layers
    made.layers_mapping = {0: (0, True), 1: (0, False), 2: (1, True)}
    return made


def test_the_engine_keeps_windows_of_dots3_apart() -> None:
    from sglang.srt.configs.dots3 import Dots3Config
    from sglang.srt.configs.model_config import is_hybrid_swa_model
    from sglang.srt.models.registry import ModelRegistry

    architecture = "Dots3NoteForCausalLM"
    assert architecture in ModelRegistry.get_supported_archs()
    assert is_hybrid_swa_model([architecture], Dots3Config())
    refuse_model(architecture)


def built(pool: Any, page: int = 64) -> Any:
    given = context(pool, page)
    given.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(prefill_aware_swa=False))
    return factory._served_pool(given)


def parameters(**drafts: Any) -> Any:
    return SimpleNamespace(
        **{"mtp_draft_device_pools": (), "sidecar_draft_device_pools": (), **drafts}
    )


def test_plain_rows_are_served(pool: Any) -> None:
    assert built(pool) is pool
    kv = LatentKv(parameters(), pool, Geometry(16, 511))
    assert kv.page_bytes == (16 * 576 * 2, 2 * 16 * 320 * 2)
    planned = LatentShape(1, 2, window=512, row=576, swa_row=320).page_planes(16)
    assert kv.page_bytes == tuple(map(sum, planned)), "a plan says something else"


def test_an_index_is_refused_since_nobody_waits_for_it(pool: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    pool.full_kv_pool = DSATokenToKVPool.__new__(DSATokenToKVPool)
    with pytest.raises(StartupError, match=r"with an index \(DSA\), is not supported; allowed: "):
        built(pool)


def test_pools_of_other_machines_are_refused_by_their_class(pool: Any) -> None:
    class OtherPool(type(pool.swa_kv_pool)):
        pass

    pool.swa_kv_pool.__class__ = OtherPool
    with pytest.raises(StartupError, match="in pools of type OtherPool, is not supported"):
        built(pool)


def test_pages_that_are_parts_of_one_are_refused(pool: Any) -> None:
    with pytest.raises(StartupError, match=r"--page-size 8, is not supported; allowed: .* 16 or"):
        built(pool, page=8)


@pytest.mark.parametrize("field", ["mtp_draft_device_pools", "sidecar_draft_device_pools"])
def test_drafts_are_refused_with_what_to_use(pool: Any, field: str) -> None:
    with pytest.raises(StartupError, match="use --speculative-algorithm NGRAM"):
        LatentKv(parameters(**{field: (pool,)}), pool, Geometry(16, 511))
