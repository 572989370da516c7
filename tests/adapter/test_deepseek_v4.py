"""DeepSeek-V4: components of many planes. What a page is, goes to every tier and back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.adapter import byte_pages, factory
from sglang_ext.adapter.byte_pages import ByteLayers, in_order, rows_by_page
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW
from tests.adapter.lost_planes import WAYS
from tests.fixtures.zygote import Zygote

TRAFFIC = "tests.adapter.deepseek_v4_traffic"
BUGS = ("states_are_not_copied", "a_ratio_is_not_loaded", "planes_lie_on_each_other",
        "the_index_is_not_paid_for", "layers_come_one_gate_later",
        "states_are_those_of_the_next_page", "a_moved_page_is_torn")  # fmt: skip


def test_every_plane_of_every_page_goes_to_every_tier_and_back(zygote: Zygote) -> None:
    lines = zygote.lines("tests.adapter.deepseek_v4_views")
    assert len(lines) == 9
    assert all(line.endswith("ok") for line in lines), lines


@pytest.mark.full
def test_rows_of_any_width_are_copied_by_both_kernels(zygote: Zygote) -> None:
    lines = zygote.lines("tests.adapter.byte_views")
    assert len(lines) == 4
    assert all(line.endswith("ok") for line in lines), lines


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(zygote: Zygote, bug: str) -> None:
    lines = zygote.lines("tests.adapter.deepseek_v4_views", bug)
    assert len(lines) == 2
    assert all("Error" in line for line in lines), lines


def test_conversations_read_what_they_wrote_in_every_tier_and_after_a_restart(
    zygote: Zygote, tmp_path: Path
) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path))
    first, second = map(json.loads, printed[-2:])
    for server in (first, second):
        assert server["verified"] >= server["from_device"] + server["from_host"]
    for what in ("backed_up", "loaded", "demoted", "reclaimed_duplicate", "persisted"):
        assert first["counters"][f"{what}_pages"] > 0, what
    assert first["counters"]["loaded_window_pages"] > 0
    assert first["counters"]["evicted_host_window_pages"] > 0
    assert first["from_device"] > 0 < first["from_host"]
    # all of them have been served before: what is not found is new, or behind the last page
    assert (
        second["counters"]["prefetched_pages"] > 0 < second["counters"]["prefetched_window_pages"]
    )
    assert second["from_host"] > 0.8 * second["prompt"]


PLANES = {"C4": (0, 0), "index": (0, 1), "window": (1, 0), "C128": (2, 0),
          "attention state": (3, 0), "indexer state": (3, 1)}  # fmt: skip
"""What is read: number of the pool, and of its plane."""
FEW = (("index", "load"), ("C128", "backup"), ("window", "load"), ("indexer state", "backup"))
"""One of each component both ways."""


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) in FEW else pytest.mark.full)
        for name in PLANES
        for way in WAYS
    ],
)
def test_a_plane_that_was_left_behind_is_found_by_its_name(
    zygote: Zygote, tmp_path: Path, name: str, way: str
) -> None:
    pool, plane = map(str, PLANES[name])
    printed = zygote.lines(TRAFFIC, str(tmp_path), "--lose", pool, plane, way)
    assert printed[-1].endswith(f': {name}"'), printed


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_drafts_read_what_they_wrote_in_every_tier_and_after_a_restart(
    zygote: Zygote, tmp_path: Path, kind: str
) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path), "--model", f"deepseek-v4-{kind}")
    first, second = map(json.loads, printed[-2:])
    for server in (first, second):
        assert server["verified"] >= server["from_device"] + server["from_host"]
    assert first["from_device"] > 0 < first["counters"]["loaded_window_pages"]
    assert second["counters"]["prefetched_window_pages"] > 0
    assert second["from_host"] > 0.8 * second["prompt"]


@pytest.mark.parametrize(
    ("kind", "bug", "found"),
    [
        ("mtp", ("pages_are_named_by_their_own_tokens_alone",), "draft 0"),
        ("mtp", ("--lose", "5", "0", "load"), "draft 0"),
        ("dspark", ("--lose", "4", "0", "backup"), "draft 0"),
    ],
)
def test_rows_of_drafts_that_were_left_behind_are_found(
    zygote: Zygote, tmp_path: Path, kind: str, bug: tuple[str, ...], found: str
) -> None:
    printed = zygote.lines(TRAFFIC, str(tmp_path), *bug, "--model", f"deepseek-v4-{kind}")
    assert printed[-1].endswith(f', {found}"'), printed


def test_what_is_behind_the_last_whole_page_of_a_buffer_belongs_to_none() -> None:
    buffer = torch.arange(7 * 3, dtype=torch.int16).view(7, 3)
    pages = rows_by_page(buffer, 2)
    assert pages.shape == (3, 12)
    pages[1] = 0
    assert buffer[2:4].eq(0).all(), "it is a view"
    assert torch.equal(buffer[4:], torch.arange(12, 21, dtype=torch.int16).view(3, 3))


def layers(component: int, name: str) -> ByteLayers:
    row = (torch.zeros(4, 8, dtype=torch.uint8),)
    return ByteLayers(component, name, (0,), (row,))


def test_the_first_pool_is_of_full_attention_and_the_second_of_windows() -> None:
    pools = [layers(of, str(n)) for n, of in enumerate((FULL, FULL, WINDOW, WINDOW))]
    assert [pool.name for pool in in_order(pools)] == ["0", "2", "1", "3"]


def test_copies_of_the_engine_are_refused_by_their_variable() -> None:
    host = byte_pages.ByteHost.__new__(byte_pages.ByteHost)
    assert host.copied_by(None, torch.device("cuda")) == "kernels"
    with pytest.raises(StartupError, match=r"SGLANG_EXT_COPIES=engine .* allowed: kernels"):
        host.copied_by("engine", torch.device("cuda"))


def test_storage_backends_that_know_k_and_v_alone_are_refused_by_name() -> None:
    host = byte_pages.ByteHost.__new__(byte_pages.ByteHost)
    host.refuse_storage("file")
    with pytest.raises(StartupError, match=r"--hicache-storage-backend mooncake .* allowed: file"):
        host.refuse_storage("mooncake")


@pytest.fixture
def pool() -> Any:
    """The engine's class, with what tells its forms apart."""
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    made: Any = DeepSeekV4TokenToKVPool.__new__(DeepSeekV4TokenToKVPool)
    made.request_window = made.unified_kv_pool = None
    made.needs_paged_swa_allocator = True
    made.swa_kv_pool, made.c4_kv_pool = object(), object()
    made.compression_ratios = [0, 4, 128]
    made.sources_by_ratio = {4: [1], 128: [2]}
    return made


def context(pool: Any, page: int = 256) -> Any:
    allocator = SimpleNamespace(get_kvcache=lambda: pool, size_full=512, size_swa=512)
    params = SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        pp_cache_group=None,
        page_size=page,
        decoder_swa_bounded_replay=False,
    )
    return SimpleNamespace(params=params, is_hybrid_ssm=False, is_hybrid_swa=True)


def test_pages_of_windows_are_served(pool: Any) -> None:
    assert factory._served_pool(context(pool)) is pool


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("request_window", object(), "computed again beside drafts with windows in pages"),
        ("unified_kv_pool", object(), r"ring \(unified_kv\)"),
        ("swa_kv_pool", None, r"ring \(unified_kv\)"),
        ("compression_ratios", [0, 8, 16, 128], "compression ratio 8, 16"),
        ("sources_by_ratio", {}, "without layers of compressed KV"),
    ],
)
def test_other_forms_are_refused_by_name(pool: Any, field: str, value: Any, said: str) -> None:
    setattr(pool, field, value)
    with pytest.raises(StartupError, match=f"DeepSeek-V4 .*{said}.* is not supported; allowed: "):
        factory._served_pool(context(pool))


def test_v41_is_served_where_its_windows_are_whole_or_computed_again(pool: Any) -> None:
    pool.compression_ratios, pool.sources_by_ratio = [0, 1, 2], {1: [1], 2: [2]}
    given = context(pool)
    assert factory._served_pool(given) is pool
    given.params.decoder_swa_bounded_replay = True
    with pytest.raises(StartupError, match="unset it with --no-enable-decoder-swa-bounded-replay"):
        factory._served_pool(given)
    pool.request_window, pool.swa_kv_pool = object(), None
    pool.needs_paged_swa_allocator = False
    assert factory._served_pool(given) is pool


def test_a_page_that_ends_inside_a_compressed_token_is_refused(pool: Any) -> None:
    with pytest.raises(StartupError, match="--page-size 64, no multiple of 128"):
        factory._served_pool(context(pool, page=64))


def test_pools_of_other_machines_are_refused_by_their_class(pool: Any) -> None:
    class OtherPool(type(pool)):
        pass

    pool.__class__ = OtherPool
    with pytest.raises(StartupError, match="pools of type OtherPool is not supported"):
        factory._served_pool(context(pool))


def test_a_denser_index_is_refused_by_its_option(pool: Any) -> None:
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import HiSparseC4DevicePool

    pool.c4_kv_pool = HiSparseC4DevicePool.__new__(HiSparseC4DevicePool)
    with pytest.raises(StartupError, match="--enable-hisparse is not supported"):
        factory._served_pool(context(pool))
