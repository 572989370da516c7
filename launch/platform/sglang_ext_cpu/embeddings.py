"""Drafts that are made of embeddings, not of tokens: in the type of their model.

The engine takes it for granted that this is bfloat16. Here models are float32 too.
"""

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_INPUTS = "sglang.srt.model_executor.model_runner.ModelRunner._extend_forward_kwargs"


def _as_given(original: Any, runner: Any, forward_batch: Any, *args: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = original(runner, forward_batch, *args)
    if forward_batch.input_embeds is not None and forward_batch.replace_embeds is None:
        inputs["input_embeds"] = forward_batch.input_embeds.to(runner.dtype)
    return inputs


def install() -> None:
    """Hook what collects the inputs of a model."""
    HookRegistry.register(_INPUTS, _as_given, HookType.AROUND)
