"""Installation in one engine process: contract check, selection, hook, backend."""

import logging
import sys
from typing import TYPE_CHECKING, Any

from sglang_ext import config
from sglang_ext.adapter import engine_contract, engine_patches
from sglang_ext.adapter.progress import progress
from sglang_ext.errors import StartupError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

RESOLVE = "sglang.srt.server_args.ServerArgs.resolve_once"
MODEL_OVERRIDES = "sglang.srt.arg_groups.model_hook.collect_model_override_declarations"
_WITHOUT_SWA_MEMORY = ("disable_hybrid_swa_memory", "swa_full_tokens_ratio")
"""What the engine sets for Step-3.5 and 3.7 when a host tier is on, as its own needs it."""


def install() -> None:
    """Register the backend and our part in the resolution of options.

    On an engine of another version a registered factory refuses instead, so that
    a server which never asks for the backend is left alone.

    Raises:
        StartupError: the backend is asked for and the engine does not fit, or the
            configuration is wrong.
    """
    settings = config.from_environment()
    asked_for = settings.selected or _named_on_command_line()
    check = engine_contract.problem if asked_for else engine_contract.version_problem
    problem = check()
    if problem is not None and asked_for:
        raise StartupError(problem)

    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )

    if get_radix_cache_factory(config.BACKEND) is not None:
        return
    if problem is None:
        _take_part_in_resolution(settings)
        _keep_swa_memory()
    else:
        logger.warning("sglang-ext is inactive: %s", problem)
    register_radix_cache_backend(config.BACKEND, _build)
    logger.info("sglang-ext: radix cache backend %r registered", config.BACKEND)


def _named_on_command_line() -> bool:
    return any(config.BACKEND in argument for argument in sys.argv[1:])


def _build(ctx: "TreeCacheBuildContext") -> "BasePrefixCache":
    if (problem := engine_contract.problem()) is not None:
        raise StartupError(problem)
    verify_hooks()
    if ctx.tp_rank == 0 and (patches := engine_patches.applied()):
        # not where a hook is left out: a server's log is set up after its plugins
        logger.info("sglang-ext: patches of the engine in place of hooks: %s", ", ".join(patches))

    # imported here for the first time: what is not in Numba's cache is compiled
    with progress("loops of the cache are compiled, once for a machine"):
        from sglang_ext.adapter import clear_answer, draft_pools, idle_calls, weight_updates
        from sglang_ext.adapter.factory import build_tree_cache

    if not ctx.disable_radix_cache:  # the engine's own has nothing to be told
        clear_answer.install()
        draft_pools.install()
        weight_updates.install()
        idle_calls.install()
    return build_tree_cache(ctx)


def _take_part_in_resolution(settings: config.ExtConfig) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_ext.adapter.idle_calls import install_in_front
    from sglang_ext.adapter.options import EARLY_REFUSALS, refuse_model, refuse_unsupported

    def before(server_args: "ServerArgs") -> None:
        if settings.selected and not getattr(server_args, "_resolution_finished", False):
            select(server_args)
        if server_args.radix_cache_backend == config.BACKEND:
            lay_out_by_pages(server_args)
            if not server_args.disable_radix_cache:
                refuse_unsupported(server_args, EARLY_REFUSALS)

    def after(server_args: "ServerArgs") -> None:
        view = resolving_view(server_args)
        if view.radix_cache_backend == config.BACKEND and not view.disable_radix_cache:
            refuse_unsupported(view)
            # the engine has read it by now, and keeps it there
            if (model := getattr(server_args, "_model_config", None)) is not None:
                refuse_model(model.hf_config.architectures[0], beside_kv(model))
            install_in_front()

    def resolve(original: Any, server_args: "ServerArgs") -> None:
        before(server_args)
        original(server_args)
        after(server_args)

    steps = engine_patches.RESOLVED_OPTIONS.find()
    if steps is not None:
        steps.append((before, after))
    else:
        HookRegistry.register(RESOLVE, resolve, HookType.AROUND)


def beside_kv(model: Any) -> str | None:
    """What the engine keeps of a prefix beside KV, None for nothing.

    Args:
        model: the engine's configuration of it.
    """
    from sglang.srt.configs.model_config import is_deepseek_dsa
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    if is_deepseek_dsa(model.hf_config):
        return "an index (DSA)"
    return "states of recurrent layers" if uses_ssm_state(model) else None


def _keep_swa_memory() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    backends = engine_patches.SWA_MEMORY.find()
    if backends is not None:
        backends.add(config.BACKEND)
    else:
        HookRegistry.register(MODEL_OVERRIDES, keep_swa_memory, HookType.AROUND)


def keep_swa_memory(
    original: Any, architecture: str, server_args: "ServerArgs", hf_config: Any
) -> list[tuple[str, dict[str, Any]]]:
    """The engine's settings for a model, without those that would take its sliding-window
    memory away because of the host tier."""
    declarations: list[tuple[str, dict[str, Any]]]
    declarations = original(architecture, server_args, hf_config)
    if server_args.radix_cache_backend != config.BACKEND or not architecture.startswith("Step3p"):
        return declarations
    logger.info("sglang-ext: %s keeps its sliding-window memory", architecture)
    return [
        (source, {k: v for k, v in settings.items() if k not in _WITHOUT_SWA_MEMORY})
        for source, settings in declarations
    ]


def select(server_args: "ServerArgs") -> None:
    """Turn the toggle into engine options; what the user set himself wins: with another cache
    than ours nothing is switched on."""
    if server_args.radix_cache_backend not in (None, config.BACKEND):
        logger.warning(
            "sglang-ext: %s=1 changes nothing beside --radix-cache-backend %s",
            config.TOGGLE,
            server_args.radix_cache_backend,
        )
        return
    server_args.radix_cache_backend = config.BACKEND
    if not server_args.disable_radix_cache:
        server_args.enable_hierarchical_cache = True


def lay_out_by_pages(server_args: "ServerArgs") -> None:
    """Full-attention and sliding-window pages share one host memory, so a page must be in one
    place there. The engine turns this layout into the one that fits the io backend."""
    if server_args.hicache_mem_layout == "layer_first":
        logger.info("sglang-ext: --hicache-mem-layout layer_first becomes page_first")
        server_args.hicache_mem_layout = "page_first"


def verify_hooks() -> None:
    """Prove that the hooks took: SGLang only logs when applying one fails. What a patch has
    replaced cannot fail in that way.

    Raises:
        StartupError: one did not.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs

    hooked = {RESOLVE: engine_patches.RESOLVED_OPTIONS, MODEL_OVERRIDES: engine_patches.SWA_MEMORY}
    needed = [hook for hook, patch in hooked.items() if patch.find() is None]
    for hook in needed:
        took = hook != RESOLVE or hasattr(ServerArgs.resolve_once, "__wrapped__")
        if not took or hook not in HookRegistry._patched:
            raise StartupError(f"the hook on {hook} did not take effect; see the log above")
