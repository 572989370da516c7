"""Builds the cache from the engine's context."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sglang_ext.adapter import block_hashes, checkpoint
from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.controller import HostTierController
from sglang_ext.adapter.copy_trial import Bandwidth, try_copies
from sglang_ext.adapter.device_kv import DeviceKv
from sglang_ext.adapter.device_pool import EngineDevicePool, ForwardOrder, SlotIndices
from sglang_ext.adapter.host_arena import ArenaMemory, HostUsage
from sglang_ext.adapter.host_pools import build_host_group, layers_by_component
from sglang_ext.adapter.inside import InsidePages
from sglang_ext.adapter.kv_events import KvEvents
from sglang_ext.adapter.page_copies import Pool, chosen, page_copies, planes
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.adapter.progress import progress
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.adapter.served_weights import ServedWeights, is_elsewhere
from sglang_ext.adapter.start_plan import StartPlan
from sglang_ext.adapter.step_trace import StepTrace
from sglang_ext.adapter.storage_setup import StorageSetup
from sglang_ext.adapter.stored_names import StoredNames
from sglang_ext.adapter.window_only import (
    ROWS_PER_WINDOW_PAGE,
    WindowOnlyDevicePool,
    numbers,
)
from sglang_ext.config import BACKEND, COPIES, REPORT_DELAY, SLOWDOWN, from_environment
from sglang_ext.core.cache import PrefixCache
from sglang_ext.core.device.victims import Spare
from sglang_ext.core.eviction_policy import EVERY, POLICIES, EvictionPolicy
from sglang_ext.core.host.arena import Arena, ArenaPool
from sglang_ext.core.host.tier import HostTier
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import checkpoint_pages, dense_pages, promised
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.errors import StartupError
from sglang_ext.planning.host_plan import HostPlan
from sglang_ext.transfer.cpu import CopyFaults, CpuTransferEngine
from sglang_ext.transfer.cuda import CudaTransferEngine
from sglang_ext.transfer.job import TransferEngine
from sglang_ext.transfer.layer_counter import LayerDoneCounter

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

logger = logging.getLogger(__name__)


def build_tree_cache(ctx: "TreeCacheBuildContext") -> "BasePrefixCache":
    """The cache for this model; the engine's own disabled one if caching is off.

    Raises:
        StartupError: the model's KV pools are of a kind that is not supported.
    """
    if ctx.disable_radix_cache:
        from sglang.srt.mem_cache.registry import default_radix_cache_factory

        return default_radix_cache_factory(ctx)
    from sglang.srt.runtime_context import get_memory, get_schedule

    params = ctx.params
    kv_pool = _hybrid_pool(ctx)
    assert params.sliding_window_size is not None
    window_only = ctx.full_tokens_per_layer == 0
    geometry = Geometry(
        device_page=params.page_size, window=params.sliding_window_size, whole_pages=window_only
    )
    allocator = params.token_to_kv_pool_allocator
    eviction = _eviction(get_memory().radix_eviction_policy, window_only=window_only)
    window_pages = allocator.size_swa // geometry.page_tokens
    device_pages = allocator.size_full // geometry.page_tokens
    spare = Spare.for_device(device_pages, window_pages)
    host_pages = 0
    if ctx.enable_hierarchical_cache:
        group, memory = build_host_group(params, kv_pool, geometry)
        arena = memory.arena
        host_pages = arena.shape.pages(0)
    if window_only:
        # what the host keeps of a prefix lies in the table, whatever of it has KV
        host_pages *= ROWS_PER_WINDOW_PAGE
        device_pages *= ROWS_PER_WINDOW_PAGE
    device_pool = _device_pool(ctx, geometry, device_pages)
    if not ctx.enable_hierarchical_cache:
        index = PrefixCache(geometry, device_pages, device_pool, eviction=eviction, spare=spare)
    else:
        tokens = from_environment().checkpoint_tokens
        interval = checkpoint_pages(geometry, arena.shape.page_bytes, tokens)
        dense = dense_pages(geometry, arena.shape.page_bytes, interval)
        policy = BackupPolicy.for_device(
            WritePolicy(get_memory().hicache_write_policy),
            interval,
            device_pages,
            window_pages,
            arena.shape.pages(0),
            dense,
            (params.chunked_prefill_size or 0) // geometry.page_tokens,
        )
        if window_only:
            tier = HostTier(numbers(host_pages, geometry), ArenaPool(arena, 0))
        else:
            tier = HostTier.on(arena, memory)
        index = PrefixCache(
            geometry, device_pages + host_pages, device_pool, tier, policy, eviction, spare
        )
    admission = Admission(
        pool=allocator.size_swa,
        window=geometry.retained_tokens,
        page=params.page_size,
        chunk=params.chunked_prefill_size if (params.chunked_prefill_size or 0) > 0 else None,
    )
    cache = SwaHiCache(
        params,
        index,
        device_pool,
        admission,
        kv=DeviceKv(index, windows_alone=window_only),
        inside=_inside(index, device_pool, admission.chunk),
        low_values_first=get_schedule().schedule_low_priority_values_first,
    )
    bandwidth = None
    if ctx.enable_hierarchical_cache:
        bandwidth = _attach_host_tier(ctx, cache, kv_pool, group, memory)
    if params.enable_metrics:
        _attach_metrics(cache, arena if ctx.enable_hierarchical_cache else None)
    if params.enable_kv_cache_events:
        cache.kv_events = _kv_events(ctx, cache)
    plan = start_plan(ctx, cache, memory if ctx.enable_hierarchical_cache else None, bandwidth)
    if ctx.tp_rank == 0:
        logger.info("sglang-ext: %s", plan.table())
    trace = from_environment().step_trace
    if trace is not None and dist.get_rank() == 0:
        cache.step_trace = StepTrace(Path(trace))
    return cache


def _eviction(policy: str, *, window_only: bool) -> EvictionPolicy:
    """What evicts, by the engine's name of the policy."""
    eviction = POLICIES[policy]
    # without full attention pages are numbers: which windows there is room for is not learned
    if eviction is EvictionPolicy.LRU and not window_only:
        return EVERY[from_environment().retention]
    return eviction


def start_plan(
    ctx: "TreeCacheBuildContext",
    cache: SwaHiCache,
    memory: ArenaMemory | None,
    bandwidth: Bandwidth | None,
) -> StartPlan:
    """What was decided, for the log.

    Args:
        memory, bandwidth: of the host tier, if there is one.
    """
    from sglang.srt.runtime_context import get_memory

    options, index, geometry = get_memory(), cache.index, cache.index.geometry
    host = None
    if memory is not None:
        shape = memory.arena.shape
        policy = index.policy
        recompute = promised(geometry, policy.checkpoint_pages, policy.dense_pages)
        host = HostPlan.of(shape, geometry, memory.source, recompute)
    device = torch.device(ctx.params.token_to_kv_pool_allocator.get_kvcache().device)
    who = chosen(from_environment().copies, device)
    by = f", --hicache-io-backend {options.hicache_io_backend}" if who == "engine" else ""
    eviction = index.eviction_policy.name.lower()
    return StartPlan(
        host=host,
        ranks=ctx.tp_size,
        policies=(
            options.hicache_write_policy,
            f"{eviction} (--radix-eviction-policy {options.radix_eviction_policy})",
        ),
        copies=f"{who}{by}; tried at start: {bandwidth}",
        storage=cache.storage.setup.opened if cache.storage.setup is not None else None,
    )


def _device_pool(
    ctx: "TreeCacheBuildContext", geometry: Geometry, device_pages: int
) -> EngineDevicePool | WindowOnlyDevicePool:
    allocator: Any = ctx.params.token_to_kv_pool_allocator
    if geometry.whole_pages:
        return WindowOnlyDevicePool(allocator, geometry, device_pages)
    forward = ForwardOrder(ctx.tp_worker.model_runner.forward_stream)
    return EngineDevicePool(allocator, geometry, forward)


def _inside(
    index: PrefixCache, device_pool: EngineDevicePool | WindowOnlyDevicePool, chunk: int | None
) -> InsidePages | None:
    if not index.geometry.resumes_inside or isinstance(device_pool, WindowOnlyDevicePool):
        return None
    return InsidePages(index, device_pool, chunk)


def _attach_host_tier(
    ctx: "TreeCacheBuildContext",
    cache: SwaHiCache,
    kv_pool: "SWAKVPool",
    group: "HostPoolGroup",
    memory: ArenaMemory,
) -> Bandwidth:
    """Returns how fast copies are."""
    from sglang.srt.runtime_context import get_memory, get_serving

    index = cache.index
    controller, bandwidth = _controller(ctx, kv_pool, group, index)
    usage = HostUsage(memory.arena, index.geometry.page_tokens)
    cache.attach_host_tier(controller, group, memory, usage)
    kv_pool.register_layer_transfer_counter(controller.layer_done_counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(controller.layer_done_counter)
    metrics = ctx.params.enable_metrics
    weights = _served_weights(ctx)
    setup = StorageSetup(index, kv_pool, group, memory, weights, metrics=metrics)
    cache.storage.use(controller, setup)
    if (manager := ctx.tp_worker.model_runner.lora_manager) is not None:
        index.name_namespaces(StoredNames(manager.loras).seed)
    options = get_memory()
    if options.hicache_storage_backend is not None:
        cache.storage.open(
            options.hicache_storage_backend,
            options.hicache_storage_backend_extra_config,
            options.hicache_storage_prefetch_policy,
            get_serving().served_model_name,
        )
    return bandwidth


def _kv_events(ctx: "TreeCacheBuildContext", cache: SwaHiCache) -> KvEvents:
    block_hashes.prepare()
    params, controller = ctx.params, cache.cache_controller
    namings = block_hashes.Namings(
        params.kv_event_lora_names, dynamo_format=params.dynamo_kv_event_format
    )

    def storage() -> str | None:
        return None if controller is None else controller.storage_backend_type

    return KvEvents(cache.index, namings, storage)


def _served_weights(ctx: "TreeCacheBuildContext") -> ServedWeights:
    from sglang.srt.runtime_context import get_model

    model = get_model()
    root = None
    if not is_elsewhere(model.load_format, model.weight_cache_mode):
        root = checkpoint.find(model.model_path, model.revision, model.download_dir)
    return ServedWeights(root, RankAgreement(_groups(ctx)).minimum)


def _groups(ctx: "TreeCacheBuildContext") -> tuple[Any, ...]:
    return ctx.params.attn_cp_cache_group, ctx.params.tp_cache_group


def _hybrid_pool(ctx: "TreeCacheBuildContext") -> "SWAKVPool":
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool: Any = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    if ctx.is_hybrid_ssm or not ctx.is_hybrid_swa:
        raise StartupError(
            f"--radix-cache-backend {BACKEND} serves models with full and sliding-window "
            f"attention; this model's pool is {type(pool).__name__}"
        )
    if ctx.tp_worker.model_runner.prefill_aware_swa:
        raise StartupError(
            f"{BACKEND}: models that read their whole prompt while they decode, with a "
            "sliding window for the rest, are not supported"
        )
    kinds = [type(pool)]
    if type(pool) is SWAKVPool:
        kinds = [type(pool.full_kv_pool), type(pool.swa_kv_pool)]
        if all(issubclass(kind, MHATokenToKVPool) for kind in kinds):
            _refuse_scales_of_blocks(pool)
            return pool
    names = ", ".join(kind.__name__ for kind in kinds)
    raise StartupError(f"{BACKEND}: KV pools of type {names} are not supported; allowed: MHA")


def _refuse_scales_of_blocks(pool: "SWAKVPool") -> None:
    # a checkpoint can ask for them too, so the option does not say all; the pools may be of the
    # same class as any other
    for component in (pool.full_kv_pool, pool.swa_kv_pool):
        if getattr(component, "k_scale_buffer", None) is not None:
            raise StartupError(
                f"{BACKEND}: KV with scales for its blocks (FP4, MXFP8) is not supported; "
                "use --kv-cache-dtype fp8_e4m3"
            )


def _pools(group: "HostPoolGroup") -> list[Pool]:
    """Host and device pools of the full-attention and of the sliding-window component."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    entries = [group.entry_map.get(name) for name in (PoolName.KV, PoolName.SWA)]
    return [None if e is None else (e.host_pool, e.device_pool) for e in entries]


def _controller(
    ctx: "TreeCacheBuildContext",
    kv_pool: "SWAKVPool",
    group: "HostPoolGroup",
    index: PrefixCache,
) -> tuple[HostTierController, Bandwidth]:
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_memory

    device = torch.device(kv_pool.device)
    config = from_environment()
    indices = SlotIndices(index.geometry)
    io_backend = get_memory().hicache_io_backend
    pools = _pools(group)
    said = f"--hicache-io-backend {io_backend}, {COPIES}={config.copies or 'unset'}"
    with progress("copies between device and host are compiled and tried"):
        copies = page_copies(config.copies, pools, indices, io_backend, device)
        bandwidth = try_copies(copies, [planes(pool) for pool in pools], said)
    layers = _layer_schedule(kv_pool)
    engine: TransferEngine
    faults = CopyFaults(config.report_delay_ms / 1000.0, config.backup_slowdown)
    if faults != CopyFaults() and device.type != "cpu":
        raise StartupError(f"{REPORT_DELAY} and {SLOWDOWN} are for the CPU platform only")
    if device.type == "cuda":
        engine = CudaTransferEngine(copies, layers, timed=ctx.params.enable_metrics)
    elif device.type == "cpu":
        engine = CpuTransferEngine(copies, layers, faults)
    else:
        raise StartupError(f"{BACKEND}: device {device.type} is not supported; allowed: cuda, cpu")
    counter = LayerDoneCounter(len(layers))
    controller = HostTierController(
        index,
        engine,
        counter,
        RankAgreement(_groups(ctx)),
        compare_ranks=envs.SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK.get(),
    )
    return controller, bandwidth


def _layer_schedule(kv_pool: "SWAKVPool") -> list[tuple[int, int] | None]:
    """(component, layer of the component) for each layer of the model."""
    schedule: list[tuple[int, int] | None] = []
    for component, layers in enumerate(layers_by_component(kv_pool)):
        for layer, local in layers.items():
            schedule.extend([None] * (layer + 1 - len(schedule)))
            schedule[layer] = (component, local)
    return schedule


def _attach_metrics(cache: SwaHiCache, arena: Arena | None) -> None:
    from sglang.srt.observability import metrics_collector as engine

    from sglang_ext.adapter.engine_metrics import HostTierFeed, StorageFeed
    from sglang_ext.adapter.metrics import IndexMetrics

    cache.init_metrics_collector()
    collector, index = cache.metrics_collector, cache.index
    assert collector is not None
    cache.metrics = metrics = IndexMetrics(index, collector.labels, arena)
    if arena is not None:
        assert cache.cache_controller is not None
        page = index.geometry.page_tokens
        take = cache.cache_controller.take_durations
        metrics.host = HostTierFeed(collector, arena, page, index.policy.write, take)
        make = engine.resolve_collector_class(
            engine.STAT_LOGGER_ROLE_STORAGE, engine.StorageMetricsCollector
        )
        metrics.storage = StorageFeed(page, make)
    cache.storage.export_to(metrics)
