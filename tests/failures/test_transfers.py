"""Catalogue 2G: transfers, layouts, geometry."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_ext.adapter import factory
from sglang_ext.adapter.device_pool import SlotIndices
from sglang_ext.adapter.page_copies import EngineCopies
from sglang_ext.adapter.stacks import schedule_of
from sglang_ext.core.plan import TransferKind
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.errors import StartupError
from sglang_ext.storage.port import FULL, WINDOW
from sglang_ext.transfer.cpu import CpuTransferEngine
from sglang_ext.transfer.job import Job, Part
from tests.failures.scenarios import ALL, check_all, engine_with, find, prompt, run, serve
from tests.fixtures.zygote import Zygote

WIDER_KEYS = [("page_first", "kernel"), ("page_first_direct", "direct")]
LAYOUTS = [
    *WIDER_KEYS,
    ("layer_first", "kernel"),
    ("page_head", "kernel"),
    ("layer_first", "direct"),
]


@pytest.fixture(scope="module")
def round_trips(zygote: Zygote) -> dict[str, str]:
    """Result by case, see round_trips.py."""
    words = [line.split(" ") for line in zygote.lines("tests.failures.round_trips")]
    return {" ".join(line[:5]): " ".join(line[5:]) for line in words if len(line) > 5} | {
        line[0]: line[1] for line in words if len(line) == 2
    }


@pytest.mark.parametrize(("layout", "io_backend"), WIDER_KEYS)
def test_keys_wider_than_values_come_back(
    round_trips: dict[str, str], layout: str, io_backend: str
) -> None:
    """G-1: K and V rows have different widths."""
    assert round_trips[f"{layout} {io_backend} 2 12 8"] == "ok"


@pytest.mark.parametrize("rows", ["2 8 8", "3 5 5"])
@pytest.mark.parametrize(("layout", "io_backend"), LAYOUTS)
def test_rows_of_any_size_come_back(
    round_trips: dict[str, str], layout: str, io_backend: str, rows: str
) -> None:
    """G-1, G-4: also rows that are no multiple of 128 bytes. No other byte changes."""
    assert round_trips[f"{layout} {io_backend} {rows}"] == "ok"


def test_kv_with_scales_that_no_transfer_moves_is_refused(round_trips: dict[str, str]) -> None:
    """G-5: the engine's host pool, which every copy goes through, does not take it."""
    assert round_trips["scales"] == "refused"


@pytest.mark.parametrize(
    ("io_backend", "staged", "host_on", "device_on"),
    [
        ("kernel", False, "meta", "meta"),
        ("kernel", True, "cpu", "meta"),
        ("direct", False, "cpu", "cpu"),
    ],
)
def test_indices_lie_where_the_copy_wants_them(
    io_backend: str, staged: bool, host_on: str, device_on: str
) -> None:
    """G-2: "meta" stands for the accelerator."""
    seen: list[tuple[str, str]] = []

    class HostPool:
        can_use_write_back_jit = staged
        target_layer_num = 1

        def backup_from_device_all_layer(self, pool: Any, host: Any, device: Any, io: str) -> None:
            seen.append((host.device.type, device.device.type))

        def load_to_device_per_layer(
            self, pool: Any, host: Any, device: Any, layer: int, io: str, *, is_draft: bool
        ) -> None:
            seen.append((host.device.type, device.device.type))

    pool: Any = HostPool()
    copies = EngineCopies(
        [(pool, None)], SlotIndices(Geometry(16, 32)), io_backend, torch.device("meta")
    )
    job = copies.prepare([Part(FULL, np.arange(4), np.arange(4))])
    job.backup()
    job.load_layer(FULL, 0)
    assert seen == [(host_on, device_on), (device_on, device_on)]


def test_a_backup_reads_its_pages_while_the_forward_writes_others() -> None:
    """G-3: the pages are the table's, held until the copy has ended; the device is full."""
    engine = engine_with(device_pages=12, device_window_pages=12, pinned_share=1)
    tokens = prompt(6)
    serve(engine, tokens)
    backup = next(iter(engine.index.pending[TransferKind.BACKUP].values()))
    for seed in range(1, 4):
        engine.abort(run(engine, prompt(4, seed)))  # six pages are left for each
        held = engine.index.table.device.slots[backup.full.rows]
        assert (held == backup.full.device).all()
        assert not set(held.ravel().tolist()) & set(engine.device.full.free)
    engine.settle()
    engine.index.evict_device(ALL, ALL)
    assert len(find(engine, tokens).rows) == 6
    check_all(engine, idle=True)


class Recorder:
    """Copies that note the layers they load."""

    def __init__(self, log: list[tuple[int, int]]) -> None:
        self._log = log

    def prepare(self, parts: Sequence[Part]) -> "Recorder":
        return self

    def backup(self) -> None:
        pass

    def load_layer(self, pool: int, layer: int) -> None:
        self._log.append((pool, layer))


def test_readers_wait_for_layers_by_their_number_in_the_model() -> None:
    """G-7: each component counts its own layers, and some layers have no KV at all."""
    mapping = {0: (0, True), 1: (0, False), 3: (1, True), 5: (2, True), 6: (1, False)}
    pool: Any = SimpleNamespace(layers_mapping=mapping)
    schedule = schedule_of(pool, [])
    assert schedule == [
        *([(WINDOW, 0)], [(FULL, 0)], [], [(WINDOW, 1)]),
        *([], [(WINDOW, 2)], [(FULL, 1)]),
    ]
    log: list[tuple[int, int]] = []
    engine = CpuTransferEngine(Recorder(log), schedule)
    index = np.arange(1)
    parts = (Part(FULL, index, index), Part(WINDOW, index, index))
    gate = engine.submit_load(Job(range(1), parts), None)
    for number, layers in enumerate(schedule):
        gate.wait(number)
        assert set(layers) <= set(log), "the reader went ahead of its layer"
    engine.close()
    assert log == [layer for layers in schedule for layer in layers]


def _context(pool: Any) -> Any:
    allocator = SimpleNamespace(get_kvcache=lambda: pool, size_full=64, size_swa=64)
    params = SimpleNamespace(token_to_kv_pool_allocator=allocator, pp_cache_group=None)
    return SimpleNamespace(
        params=params,
        is_hybrid_ssm=False,
        is_hybrid_swa=True,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(prefill_aware_swa=False)),
    )


@pytest.mark.parametrize("component", ["full_kv_pool", "swa_kv_pool", "both"])
def test_pools_that_are_not_mha_are_refused_by_name(component: str) -> None:
    """G-4, G-8, H5: latent rows, logical pools, and pools with an index beside the KV."""
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool: Any = SWAKVPool.__new__(SWAKVPool)
    for name in ("full_kv_pool", "swa_kv_pool"):
        setattr(pool, name, memory_pool.MHATokenToKVPool.__new__(memory_pool.MHATokenToKVPool))
    assert factory._served_pool(_context(pool)) is pool
    if component == "both":
        pool, name = SimpleNamespace(), "SimpleNamespace"
    else:
        name = "DSATokenToKVPool"
        setattr(pool, component, memory_pool.DSATokenToKVPool.__new__(memory_pool.DSATokenToKVPool))
    with pytest.raises(StartupError, match=f"{name}.* not supported"):
        factory._served_pool(_context(pool))


@pytest.mark.parametrize("component", ["full_kv_pool", "swa_kv_pool"])
def test_pools_with_scales_beside_their_kv_are_refused_by_name(component: str) -> None:
    """FP4 by the checkpoint's own word: the same class of pool, with two more planes of a page."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool: Any = SWAKVPool.__new__(SWAKVPool)
    for name in ("full_kv_pool", "swa_kv_pool"):
        setattr(pool, name, MHATokenToKVPool.__new__(MHATokenToKVPool))
        getattr(pool, name).k_scale_buffer = None
    assert factory._served_pool(_context(pool)) is pool
    getattr(pool, component).k_scale_buffer = [torch.zeros(1)]
    with pytest.raises(StartupError, match=r"scales .* not supported; use --kv-cache-dtype fp8"):
        factory._served_pool(_context(pool))


def test_slots_name_the_same_tokens_on_both_sides() -> None:
    """G-9: the engine copies tokens of its pools, page by page."""
    for page in (1, 2, 16, 64):
        geometry = Geometry(page, 32)
        indices = SlotIndices(geometry)
        slots = np.arange(2 * geometry.slots_per_page, dtype=np.int32).reshape(2, -1)[::-1] + 3
        tokens = indices.tokens(slots)
        size = geometry.page_tokens
        assert len(tokens) == 2 * size
        assert (tokens.view(2, -1, page)[:, :, 0] == torch.from_numpy(slots * page)).all()
        assert (indices.slots(tokens) == slots).all()
