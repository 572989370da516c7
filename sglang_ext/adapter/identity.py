"""What KV is of: pages of other weights, another layout or another engine are not ours."""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_ext.adapter import checkpoint

_FORMAT = 2


class Kind(enum.Enum):
    """What counts of an option."""

    VALUE = "its value"
    CONTENTS = "what is in the file or directory that it names"


@dataclasses.dataclass(frozen=True, slots=True)
class KvOption:
    """An option of the engine that changes what is computed for the same weights and tokens."""

    name: str
    kind: Kind
    why: str


KV_OPTIONS = (
    KvOption("dtype", Kind.VALUE, "type of activations"),
    KvOption("quantization", Kind.VALUE, "of weights"),
    KvOption("quantization_param_path", Kind.CONTENTS, "scales of KV"),
    KvOption("kv_cache_dtype", Kind.VALUE, "type of KV"),
    KvOption("load_format", Kind.VALUE, "which files are the weights"),
    KvOption("model_loader_extra_config", Kind.VALUE, "what a loader does to them"),
    KvOption("modelopt_quant", Kind.VALUE, "quantization at start"),
    KvOption("modelopt_checkpoint_restore_path", Kind.CONTENTS, "its state"),
    KvOption("quantize_and_serve", Kind.VALUE, "quantization at start"),
    KvOption("rl_quant_profile", Kind.CONTENTS, "quantization of updates"),
    KvOption("json_model_override_args", Kind.VALUE, "positions, windows, anything"),
    KvOption("decrypted_config_file", Kind.CONTENTS, "stands for config.json"),
    KvOption("model_config_parser", Kind.VALUE, "how the configuration is read"),
    KvOption("model_impl", Kind.VALUE, "whose model code"),
    KvOption("trust_remote_code", Kind.VALUE, "whose model code"),
    KvOption("forward_hooks", Kind.VALUE, "code of the user in the model"),
    KvOption("enable_tf32_matmul", Kind.VALUE, "precision of products"),
    KvOption("flashinfer_mxfp4_moe_precision", Kind.VALUE, "precision of experts"),
    KvOption("enable_w4a4_mxfp4_megamoe", Kind.VALUE, "precision of experts"),
    KvOption("deepep_dispatcher_output_dtype", Kind.VALUE, "precision of experts' input"),
    KvOption("enable_quant_communications", Kind.VALUE, "precision between ranks"),
    KvOption("prefill_kv_cache_dequant_dtype", Kind.VALUE, "precision of attention"),
    KvOption("kt_weight_path", Kind.CONTENTS, "experts on the CPU"),
    KvOption("kt_method", Kind.VALUE, "their quantization"),
    KvOption("kt_num_gpu_experts", Kind.VALUE, "which experts they are"),
    KvOption("kt_max_deferred_experts_per_token", Kind.VALUE, "experts that come a layer late"),
    KvOption("enable_encoder_swa_bounded_replay", Kind.VALUE, "what windows are computed from"),
    KvOption("enable_decoder_swa_bounded_replay", Kind.VALUE, "what windows are computed from"),
    KvOption("dllm_algorithm", Kind.VALUE, "what attends to what"),
    KvOption("dllm_algorithm_config", Kind.CONTENTS, "its settings"),
    KvOption("enable_precise_embedding_interpolation", Kind.VALUE, "embeddings of images"),
    KvOption("mm_process_config", Kind.VALUE, "embeddings of images"),
    KvOption("image_processor_backend", Kind.VALUE, "embeddings of images"),
    KvOption("disable_fast_image_processor", Kind.VALUE, "embeddings of images"),
    KvOption("experts_shared_outer_loras", Kind.VALUE, "how adapters apply to experts"),
)
"""Options that choose among kernels are not here: these agree but for rounding."""


def settings(value_of: Callable[[str], Any]) -> dict[str, str]:
    """What the options of KV_OPTIONS say.

    Args:
        value_of: value of an engine option by its name.
    """
    return {
        option.name: _contents(value_of(option.name))
        if option.kind is Kind.CONTENTS
        else str(value_of(option.name))
        for option in KV_OPTIONS
    }


def _contents(named: Any) -> str:
    """A file whole, a directory as a checkpoint; the name of what is neither."""
    path = Path(str(named))
    try:
        if named and path.is_file():
            return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        if named and path.is_dir():
            return f"{checkpoint.configuration(path).hex()} {checkpoint.weights(path)!r}"
    except OSError:
        pass
    return str(named)


def identity(model: bytes, weights: bytes, kv: dict[str, Any]) -> bytes:
    """16 bytes that differ where KV differs.

    Args:
        model: digest of the model's configuration.
        weights: digest of its weights.
        kv: what else decides on the bytes of a page; JSON.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([_FORMAT, kv], sort_keys=True).encode())
    digest.update(model + weights)
    return digest.digest()
