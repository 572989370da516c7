"""Builds the cache from the engine's context."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sglang_ext.adapter import (
    block_hashes,
    checkpoint,
    deepseek_v4,
    drafts,
    full_alone,
    latent,
    pipeline,
)
from sglang_ext.adapter.admission import Admission
from sglang_ext.adapter.controller import HostTierController
from sglang_ext.adapter.copy_trial import Bandwidth, try_copies
from sglang_ext.adapter.device_kv import DeviceKv
from sglang_ext.adapter.device_pool import (
    EngineDevicePool,
    ForwardOrder,
    SlotIndices,
    tokens_of,
)
from sglang_ext.adapter.full_alone import FullAloneDevicePool, FullAloneKv
from sglang_ext.adapter.host_arena import ArenaMemory, HostUsage
from sglang_ext.adapter.host_kv import HostKv
from sglang_ext.adapter.host_pools import StackedKv
from sglang_ext.adapter.inside import InsidePages
from sglang_ext.adapter.kv_events import KvEvents
from sglang_ext.adapter.model_kv import ModelKv
from sglang_ext.adapter.options import OWN_CACHE
from sglang_ext.adapter.prefix_cache import SwaHiCache
from sglang_ext.adapter.progress import progress
from sglang_ext.adapter.rank_agreement import RankAgreement
from sglang_ext.adapter.request_spans import RequestSpans
from sglang_ext.adapter.served_weights import ServedWeights, is_elsewhere
from sglang_ext.adapter.session_refs import SessionRefs
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
from sglang_ext.core.host.arena import Arena
from sglang_ext.core.host.tier import HostTier
from sglang_ext.core.moves.policy import BackupPolicy
from sglang_ext.core.table.geometry import Geometry
from sglang_ext.core.table.window import checkpoint_pages, dense_pages, promised, window_cost
from sglang_ext.core.write_policy import WritePolicy
from sglang_ext.errors import StartupError
from sglang_ext.planning.host_plan import HostPlan
from sglang_ext.transfer.cpu import CopyFaults, CpuTransferEngine
from sglang_ext.transfer.cuda import CudaTransferEngine
from sglang_ext.transfer.job import TransferEngine
from sglang_ext.transfer.layer_counter import LayerDoneCounter

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    from sglang_ext.adapter.metrics import DeviceSizes

logger = logging.getLogger(__name__)


def build_tree_cache(ctx: "TreeCacheBuildContext") -> "BasePrefixCache":
    """The cache for this model; the engine's own disabled one if caching is off.

    Raises:
        StartupError: the model's KV pools are of a kind that is not supported.
    """
    if ctx.disable_radix_cache:
        from sglang.srt.mem_cache.registry import default_radix_cache_factory

        return default_radix_cache_factory(ctx)
    from sglang.srt.runtime_context import get_schedule

    params = ctx.params
    kv_pool = _served_pool(ctx)
    window_only = ctx.full_tokens_per_layer == 0
    geometry = _geometry(ctx, window_only=window_only)
    kv = _model_kv(ctx, kv_pool, geometry)
    eviction = _eviction(params, window_only=window_only)
    device_tokens, window_tokens = tokens_of(params.token_to_kv_pool_allocator)
    window_pages = window_tokens // geometry.page_tokens
    device_pages = device_tokens // geometry.page_tokens
    has_host = ctx.enable_hierarchical_cache
    spare = Spare.for_device(device_pages, window_pages, has_host=has_host)
    host_pages, tier, policy = 0, None, None
    if has_host:
        host = kv.build_host()
        memory = host.memory
        host_pages = memory.arena.shape.pages(0)
    if window_only:
        # what the host keeps of a prefix lies in the table, whatever of it has KV
        host_pages *= ROWS_PER_WINDOW_PAGE
        device_pages *= ROWS_PER_WINDOW_PAGE
    if has_host:
        policy = _backup_policy(params, geometry, memory.arena, (device_pages, window_pages))
        if window_only:
            tier = HostTier.of_windows(numbers(host_pages, geometry), memory.arena)
        else:
            tier = HostTier.on(memory.arena, memory)
    device_pool = _device_pool(ctx, kv, geometry, device_pages)
    index = PrefixCache(
        geometry,
        device_pages + host_pages,
        device_pool,
        tier,
        policy,
        eviction,
        spare,
        spare_pages=_spare_pages(eviction, geometry),
        pinned_share=from_environment().pinned_share,
    )
    admission = Admission(
        # what has no windows is admitted whatever there is room for
        pool=window_tokens if ctx.is_hybrid_swa else sys.maxsize,
        window=geometry.retained_tokens,
        page=params.page_size,
        chunk=params.chunked_prefill_size if (params.chunked_prefill_size or 0) > 0 else None,
    )
    by_session = eviction is EvictionPolicy.SESSIONS
    cache = SwaHiCache(
        params,
        index,
        device_pool,
        admission,
        kv=DeviceKv(index, windows_alone=window_only, has_windows=ctx.is_hybrid_swa),
        inside=_inside(index, device_pool, admission.chunk),
        low_values_first=get_schedule().schedule_low_priority_values_first,
        session_refs=SessionRefs(lambda: index.sessions) if by_session else None,
    )
    copied = None
    if ctx.enable_hierarchical_cache:
        copied = _attach_host_tier(ctx, cache, kv_pool, host)
    _let_observe(ctx, cache, kv, memory.arena if ctx.enable_hierarchical_cache else None)
    if params.enable_kv_cache_events:
        cache.kv_events = _kv_events(ctx, cache)
    plan = start_plan(ctx, cache, memory if ctx.enable_hierarchical_cache else None, copied)
    if ctx.tp_rank == 0:
        logger.info("sglang-ext: %s", plan.table())
    trace = from_environment().step_trace
    if trace is not None and dist.get_rank() == 0:
        cache.step_trace = StepTrace(Path(trace))
    return cache


def _geometry(ctx: "TreeCacheBuildContext", *, window_only: bool) -> Geometry:
    from sglang.srt.runtime_context import get_disagg

    params, algorithm = ctx.params, ctx.tp_worker.model_runner.spec_algorithm
    return Geometry(
        device_page=params.page_size,
        # what has no windows resumes where any token is
        window=params.swa_retain_window or 1,
        whole_pages=window_only
        # a prefill server sends what a request shares before the request has slots of its own
        # for the page inside which it resumed, and nothing holds that page from then on
        or get_disagg().disaggregation_mode == "prefill"
        # without a host tier the engine does not say what drafts have, and a page that is shared
        # in part is copied
        or (drafts.have_kv(algorithm) and not ctx.enable_hierarchical_cache),
        overlap=drafts.overlap(algorithm),
    )


def _backup_policy(
    params: "CacheInitParams", geometry: Geometry, arena: Arena, device: tuple[int, int]
) -> BackupPolicy:
    """What is backed up when.

    Args:
        device: pages of the device, and window pages.
    """
    from sglang.srt.runtime_context import get_memory

    tokens = from_environment().checkpoint_tokens
    interval = checkpoint_pages(geometry, arena.shape.page_bytes, tokens)
    return BackupPolicy.for_device(
        WritePolicy(get_memory().hicache_write_policy),
        interval,
        *device,
        arena.shape.pages(0),
        dense_pages(geometry, arena.shape.page_bytes, interval),
        (params.chunked_prefill_size or 0) // geometry.page_tokens,
        window_cost(geometry, arena.shape.page_bytes),
    )


def _eviction(params: "CacheInitParams", *, window_only: bool) -> EvictionPolicy:
    """What evicts, by the engine's options."""
    from sglang.srt.runtime_context import get_memory

    if params.enable_session_radix_cache:
        return EvictionPolicy.SESSIONS
    eviction = POLICIES[get_memory().radix_eviction_policy]
    # without full attention pages are numbers: which windows there is room for is not learned
    if eviction is EvictionPolicy.LRU and not window_only:
        return EVERY[from_environment().retention]
    return eviction


def _spare_pages(eviction: EvictionPolicy, geometry: Geometry) -> int:
    """Pages at the end of a prefix that may go first: what a prompt that goes on from it may
    compute beside its own tokens.

    The engine knows this policy in its own cache alone, and ends the server if that is not the one
    that was built: any other would go by recency without a word. From here on it is told so.
    """
    from sglang.srt.runtime_context import get_context, get_memory

    if eviction is not EvictionPolicy.TLRU:
        return 0
    told = get_memory().radix_eviction_policy_config or {}
    get_context().override("sglang-ext: tlru", radix_eviction_policy="lru")
    tokens = told.get("threshold", 0) - told.get("next_prompt_estimate", 0)
    return int(tokens // geometry.page_tokens)


def start_plan(
    ctx: "TreeCacheBuildContext",
    cache: SwaHiCache,
    memory: ArenaMemory | None,
    copied: tuple[str, Bandwidth] | None,
) -> StartPlan:
    """What was decided, for the log.

    Args:
        memory: of the host tier, if there is one.
        copied: who copies between it and the device, and how fast.
    """
    from sglang.srt.runtime_context import get_memory

    options, index, geometry = get_memory(), cache.index, cache.index.geometry
    host = None
    if memory is not None:
        shape = memory.arena.shape
        policy = index.policy
        recompute = promised(geometry, policy.checkpoint_pages, policy.dense_pages)
        host = HostPlan.of(shape, geometry, memory.source, recompute)
    copies = ""
    if copied is not None:
        who, bandwidth = copied
        by = f", --hicache-io-backend {options.hicache_io_backend}" if who == "engine" else ""
        copies = f"{who}{by}; tried at start: {bandwidth}"
    eviction = index.eviction_policy.name.lower()
    return StartPlan(
        host=host,
        ranks=ctx.tp_size,
        policies=(
            options.hicache_write_policy,
            f"{eviction} (--radix-eviction-policy {options.radix_eviction_policy})",
        ),
        copies=copies,
        storage=cache.storage.setup.opened if cache.storage.setup is not None else None,
    )


def _model_kv(ctx: "TreeCacheBuildContext", kv_pool: Any, geometry: Geometry) -> ModelKv:
    params = ctx.params
    if deepseek_v4.is_pool(kv_pool):
        return deepseek_v4.DeepSeekV4Kv(params, kv_pool, geometry)
    drafts.refuse_elsewhere(ctx.tp_worker.model_runner.spec_algorithm)
    if full_alone.is_pool(kv_pool):
        return FullAloneKv(params, kv_pool, geometry)
    if latent.is_pool(kv_pool):
        return latent.LatentKv(params, kv_pool, geometry)
    return StackedKv(params, kv_pool, drafts.layers(params), geometry)


def _device_pool(
    ctx: "TreeCacheBuildContext", kv: ModelKv, geometry: Geometry, device_pages: int
) -> EngineDevicePool | WindowOnlyDevicePool | FullAloneDevicePool:
    allocator: Any = ctx.params.token_to_kv_pool_allocator
    if not ctx.is_hybrid_swa:
        return FullAloneDevicePool(allocator, geometry, device_pages)
    if ctx.full_tokens_per_layer == 0:
        return WindowOnlyDevicePool(allocator, geometry, device_pages)
    forward = ForwardOrder(ctx.tp_worker.model_runner.forward_stream)
    return EngineDevicePool(allocator, geometry, forward, kv.drafts)


def _inside(
    index: PrefixCache,
    device_pool: EngineDevicePool | WindowOnlyDevicePool | FullAloneDevicePool,
    chunk: int | None,
) -> InsidePages | None:
    if not (index.geometry.resumes_inside and isinstance(device_pool, EngineDevicePool)):
        return None
    return InsidePages(index, device_pool, chunk)


def _attach_host_tier(
    ctx: "TreeCacheBuildContext",
    cache: SwaHiCache,
    kv_pool: Any,
    host: HostKv,
) -> tuple[str, Bandwidth]:
    """Returns who copies, and how fast that is."""
    from sglang.srt.runtime_context import get_memory, get_serving

    index = cache.index
    controller, copied = _controller(ctx, host, index)
    usage = HostUsage(host.memory.arena, index.geometry.page_tokens)
    cache.attach_host_tier(controller, host, usage)
    kv_pool.register_layer_transfer_counter(controller.layer_done_counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(controller.layer_done_counter)
    metrics = ctx.params.enable_metrics
    weights = _served_weights(ctx)
    setup = StorageSetup(index, host, weights, metrics=metrics)
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
    return copied


def _kv_events(ctx: "TreeCacheBuildContext", cache: SwaHiCache) -> KvEvents:
    block_hashes.prepare()
    params, controller = ctx.params, cache.cache_controller
    namings = block_hashes.Namings(
        params.kv_event_lora_names,
        dynamo_format=params.dynamo_kv_event_format,
        pairs=params.is_eagle,
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
    of_drafts = drafts.checkpoints(ctx.tp_worker.model_runner.spec_algorithm)
    return ServedWeights(root, RankAgreement(_groups(ctx)).minimum, of_drafts)


def _groups(ctx: "TreeCacheBuildContext") -> tuple[Any, ...]:
    """Of the ranks of one pipeline stage."""
    return ctx.params.attn_cp_cache_group, ctx.params.tp_cache_group


def _served_pool(ctx: "TreeCacheBuildContext") -> "SWAKVPool | DeepSeekV4TokenToKVPool":
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    pool: Any = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    if deepseek_v4.is_pool(pool):
        deepseek_v4.refuse_other_forms(pool, ctx.params)
        _refuse_unlike_stages(ctx.params)
        return pool
    if full_alone.is_pool(pool) and not (ctx.is_hybrid_ssm or ctx.is_hybrid_swa):
        algorithm = ctx.tp_worker.model_runner.spec_algorithm
        full_alone.refuse_other_forms(ctx.params, drafts_have_kv=drafts.have_kv(algorithm))
        _refuse_scales_of_blocks((pool,))
        _refuse_unlike_stages(ctx.params)
        return pool
    if ctx.is_hybrid_ssm or not ctx.is_hybrid_swa:
        raise StartupError(
            f"--radix-cache-backend {BACKEND} serves models with full and sliding-window "
            f"attention; this model's pool is {type(pool).__name__}; use {OWN_CACHE}"
        )
    if ctx.tp_worker.model_runner.prefill_aware_swa:
        raise StartupError(
            f"{BACKEND}: models that read their whole prompt while they decode, with a "
            f"sliding window for the rest, are not supported; use {OWN_CACHE}"
        )
    if latent.is_pool(pool):
        latent.refuse_other_forms(pool, ctx.params.page_size)
        _refuse_unlike_stages(ctx.params)
        return pool
    kinds = [type(pool)]
    if type(pool) is SWAKVPool:
        kinds = [type(pool.full_kv_pool), type(pool.swa_kv_pool)]
        if all(issubclass(kind, MHATokenToKVPool) for kind in kinds):
            _refuse_scales_of_blocks((pool.full_kv_pool, pool.swa_kv_pool))
            _refuse_unlike_stages(ctx.params)
            return pool
    names = ", ".join(kind.__name__ for kind in kinds)
    raise StartupError(
        f"{BACKEND}: KV pools of type {names} are not supported; allowed: MHA, MLA, or those of "
        f"DeepSeek-V4; or use {OWN_CACHE}"
    )


def _refuse_unlike_stages(params: "CacheInitParams") -> None:
    pipeline.refuse_unlike(params, tokens_of(params.token_to_kv_pool_allocator))


def _refuse_scales_of_blocks(components: Sequence[Any]) -> None:
    # a checkpoint can ask for them too, so the option does not say all; the pools may be of the
    # same class as any other
    for component in components:
        if getattr(component, "k_scale_buffer", None) is not None:
            raise StartupError(
                f"{BACKEND}: KV with scales for its blocks (FP4, MXFP8) is not supported; "
                "use --kv-cache-dtype fp8_e4m3"
            )


def _controller(
    ctx: "TreeCacheBuildContext",
    host: HostKv,
    index: PrefixCache,
) -> tuple[HostTierController, tuple[str, Bandwidth]]:
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_memory

    device = torch.device(ctx.params.token_to_kv_pool_allocator.get_kvcache().device)
    config = from_environment()
    indices = SlotIndices(index.geometry)
    io_backend = get_memory().hicache_io_backend
    said = f"--hicache-io-backend {io_backend}, {COPIES}={config.copies or 'unset'}"
    who = host.copied_by(config.copies, device)
    with progress("copies between device and host are compiled and tried"):
        copies = host.copies(who, indices, io_backend, device)
        bandwidth = try_copies(copies, host.planes, said)
    layers = host.schedule
    engine: TransferEngine
    faults = CopyFaults(config.report_delay_ms / 1000.0, config.backup_slowdown)
    if faults != CopyFaults() and device.type != "cpu":
        raise StartupError(f"unset {REPORT_DELAY} and {SLOWDOWN}: they are for the CPU platform")
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
        pools=host.of_components,
        stages=pipeline.Stages(ctx.params.pp_cache_group) if ctx.params.pp_size > 1 else None,
        compare_ranks=envs.SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK.get(),
    )
    return controller, (who, bandwidth)


def _let_observe(
    ctx: "TreeCacheBuildContext", cache: SwaHiCache, kv: ModelKv, arena: Arena | None
) -> None:
    """Metrics and traces, if the engine has them."""
    from sglang.srt.runtime_context import get_observability

    if ctx.params.enable_metrics:
        _attach_metrics(ctx, cache, kv, arena)
    if get_observability().enable_trace:
        cache.spans = RequestSpans(cache.index)


def _attach_metrics(
    ctx: "TreeCacheBuildContext", cache: SwaHiCache, kv: ModelKv, arena: Arena | None
) -> None:
    from sglang.srt.observability import metrics_collector as engine

    from sglang_ext.adapter.engine_metrics import HostTierFeed, StorageFeed
    from sglang_ext.adapter.metrics import IndexMetrics

    cache.init_metrics_collector()
    collector, index = cache.metrics_collector, cache.index
    assert collector is not None
    sizes = _device_sizes(ctx, kv, index.geometry)
    cache.metrics = metrics = IndexMetrics(index, collector.labels, sizes, arena)
    if arena is not None:
        assert cache.cache_controller is not None
        page = index.geometry.page_tokens
        cache.cache_controller.lag = metrics.lag
        metrics.take_ended = cache.cache_controller.take_ended
        metrics.host = HostTierFeed(collector, arena, page, index.policy.write)
        make = engine.resolve_collector_class(
            engine.STAT_LOGGER_ROLE_STORAGE, engine.StorageMetricsCollector
        )
        metrics.storage = StorageFeed(page, make)
    cache.storage.export_to(metrics)


def _device_sizes(ctx: "TreeCacheBuildContext", kv: ModelKv, geometry: Geometry) -> "DeviceSizes":
    from sglang_ext.adapter.metrics import DeviceSizes

    # pages of a model without full-attention layers are numbers
    full, window = (0, *kv.page_bytes)[-2:]
    tokens = tokens_of(ctx.params.token_to_kv_pool_allocator)
    pages = [size // geometry.page_tokens for size in tokens]
    return DeviceSizes((full, window), (pages[0] * full, pages[1] * window))
