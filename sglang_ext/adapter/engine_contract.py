"""What the adapter relies on in the engine, pinned and checked at start.

SGLang's internals change with every 0.5.x release, so a version window without a
signature check is not safe. Parameter names are compared, not annotations.
"""

import inspect
import pkgutil

ENGINE_VERSION = "0.5.23"

SIGNATURES: dict[str, str] = {
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": "name factory",
    "sglang.srt.mem_cache.registry.default_radix_cache_factory": "ctx",
    "sglang.srt.server_args.ServerArgs.resolve_once": "self",
    "sglang.srt.arg_groups.overrides.resolving_view": "server_args",
    "sglang.srt.arg_groups.model_hook.collect_model_override_declarations": (
        "architecture server_args hf_config"
    ),
    # calls of the engine into a tree cache, as its base class declares them
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.match_prefix": "self params",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.checkpoint": "self req up_to kwargs",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.evict": "self params",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.inc_lock_ref": "self node",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.dec_lock_ref": "self node params",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.path_device_indices": "self node",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.init_load_back": "self params",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.dfs_weight_order": "self node_handles",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.root_node_handle": "self extra_key",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.touch_prefix": "self key",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.take_events": "self",
    # calls of ours into the engine
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.free_page_ids": (
        "self page_ids"
    ),
    "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.free_page_ids": "self page_ids",
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.set_full_to_swa_mapping": (
        "self full_indices swa_indices"
    ),
    "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator.clear_full_to_swa_mapping": (
        "self full_indices"
    ),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.move_kv_cache": "self tgt_loc src_loc",
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.build_hybrid_swa_group": (
        "page_size full_kv_pool swa_kv_pool full_layer_mapping swa_layer_mapping use_mla "
        "kv_host_size swa_host_size host_full_evict_fn host_swa_evict_fn device_swa_evict_fn "
        "swa_attn_allocator mtp_full_device_pools mtp_swa_device_pools "
        "mtp_swa_full_device_pools transfer_layer_id_max"
    ),
    "sglang.srt.mem_cache.kv_cache_builder.maybe_register_hicache_draft": ("tree_cache draft_plan"),
    "sglang.srt.mem_cache.allocator.swa.PureSWATokenToKVPoolAllocator.free_swa": "self free_index",
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.build_kv_host_pool": (
        "kv_pool page_size use_mla override_kv_cache_dim host_size mtp_draft_device_pools "
        "pool_label"
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.build_pool_entry": (
        "name host_pool device_pool layer_mapping transfer_layer_id_max is_anchor host_evict_fn "
        "device_evict_fn device_alloc_fn device_free_fn packed_draft_device_pools"
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler._split_hicache_size": (
        "hicache_size kv_pools"
    ),
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.load_to_device_per_layer": (
        "self device_pool host_indices device_indices layer_id io_backend is_draft"
    ),
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.backup_from_device_all_layer": (
        "self device_pool host_indices device_indices io_backend"
    ),
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.alloc": "self need_size",
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.free": "self indices",
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_exists": "self keys extra_info",
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_exists_v2": (
        "self keys pool_transfers extra_info"
    ),
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_get_v1": (
        "self keys host_indices extra_info"
    ),
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_set_v1": (
        "self keys host_indices extra_info"
    ),
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_get_v2": "self transfers extra_info",
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.batch_set_v2": "self transfers extra_info",
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.register_mem_pool_host": (
        "self mem_pool_host"
    ),
    "sglang.srt.mem_cache.hicache_storage.HiCacheStorage.register_mem_host_pool_v2": (
        "self host_pool host_pool_name"
    ),
    "sglang.srt.mem_cache.storage.StorageBackendFactory.create_backend": (
        "backend_name storage_config mem_pool_host kwargs"
    ),
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController."
    "parse_storage_backend_extra_config": "storage_backend_extra_config",
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.get_page_buffer_meta": "self indices",
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.get_data_page": "self index flat",
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost.set_from_flat_data_page": (
        "self index data_page"
    ),
    "sglang.srt.managers.scheduler.Scheduler.clear_hicache_storage_wrapped": "self recv_req",
    # where bytes of a page are in DeepSeek-V4's pools
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4IndexerPool."
    "contiguous_page_row_buffers": "self",
    "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool.pd_kv_layout": "self",
    "sglang.srt.mem_cache.deepseek_v4_compress_state.CompressStatePool."
    "translate_from_swa_loc_to_state_loc": "self swa_loc",
    # KV events: what pages are called, and what is said of them
    "sglang.srt.mem_cache.utils.get_hash_str": "token_ids prior_hash page_size",
    "sglang.srt.disaggregation.kv_events.kv_event_namespace_seed": "extra_key cache_salt",
    "sglang.srt.disaggregation.kv_events.namespaced_block_hash": "block_hash namespace_seed",
    "sglang.srt.disaggregation.kv_events.BlockStored": (
        "block_hashes parent_block_hash token_ids block_size lora_id medium cache_salt "
        "session_id lora_name"
    ),
    "sglang.srt.disaggregation.kv_events.BlockRemoved": "block_hashes medium",
    "sglang.srt.mem_cache.events.KvEventLoraNames.get": "self extra_key",
    "sglang.srt.mem_cache.events.KvEventLoraNames.resolve": "self extra_key",
    # what changes weights, and what is asked of the options; see weight_updates and identity
    **{
        "sglang.srt.managers.scheduler_components.weight_updater."
        f"SchedulerWeightUpdaterManager.{name}": "self recv_req"
        for name in (
            "update_weights_from_disk",
            "update_weights_from_ipc",
            "update_weights_from_tensor",
            "update_weights_from_distributed",
            "begin_weight_update",
            "end_weight_update",
            "check_weights",
        )
    },
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "_assert_weight_cache_inactive": "self op",
    "sglang.srt.model_loader.loader.DefaultModelLoader.restore_weights_before_loading": (
        "model target_device"
    ),
    "sglang.srt.runtime_context.RuntimeContext.config_leaf": "self name",
    "sglang.srt.runtime_context.RuntimeContext.override": "self source fields",
    "sglang.srt.managers.tp_worker.TpModelWorker.register_hicache_layer_transfer_counter": (
        "self counter"
    ),
    # hooked or called by idle_calls
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle": (
        "self for_health_check ignore_waiting"
    ),
    "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine": "self",
    "sglang.srt.managers.scheduler.Scheduler._process_hicache_events": (
        "self should_retry_storage_prefetch"
    ),
    "sglang.srt.managers.scheduler.Scheduler.flush_cache": "self empty_cache",
    "sglang.srt.managers.scheduler.Scheduler.attach_hicache_storage_wrapped": "self recv_req",
    "sglang.srt.managers.scheduler.Scheduler.detach_hicache_storage_wrapped": "self recv_req",
    "sglang.srt.managers.scheduler.Scheduler.process_input_requests": "self recv_reqs",
    "sglang.srt.managers.scheduler.Scheduler.handle_dumper_control": "self recv_req",
    "sglang.srt.managers.scheduler.Scheduler.send_control_output": "self output recv_req",
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "flush_cache_after_weight_update": "self recv_req success message",
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "release_memory_occupation": "self recv_req",
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "resume_memory_occupation": "self recv_req",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
    "release_memory_occupation": "self obj request",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.flush_cache": (
        "self timeout_s"
    ),
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators": "self",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.dumper_control": "self obj",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts": (
        "self texts is_cross_encoder"
    ),
    "sglang.srt.utils.auth.auth_level": "level",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
    "start_expert_distribution_record": "self",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
    "stop_expert_distribution_record": "self",
    "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin."
    "dump_expert_distribution_record": "self",
}


def version_problem() -> str | None:
    """Why this engine version does not fit, or None. Cheap."""
    import sglang

    if sglang.__version__ != ENGINE_VERSION:
        return (
            f"this release works with sglang {ENGINE_VERSION}, "
            f"but sglang {sglang.__version__} is installed"
        )
    return None


def problem() -> str | None:
    """Why this engine does not fit, signatures included, or None. Imports much of it."""
    if (problem := version_problem()) is not None:
        return problem
    differences = [
        difference
        for path, expected in SIGNATURES.items()
        if (difference := _compare(path, expected)) is not None
    ]
    if differences:
        return "the engine differs from what this release expects: " + "; ".join(differences)
    return None


def _compare(path: str, expected: str) -> str | None:
    try:
        # unwrap: a hook of another plugin may wrap the function, decorators too
        function = inspect.unwrap(pkgutil.resolve_name(path))
    except (ImportError, AttributeError) as error:
        return f"{path} is missing ({error})"
    actual = " ".join(inspect.signature(function).parameters)
    if actual != expected:
        return f"{path} takes ({actual}), expected ({expected})"
    return None
