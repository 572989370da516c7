"""Every kit that the engine's wheel has: what runs here, and why the rest cannot."""

import ast
import dataclasses
import importlib.util
from pathlib import Path

from tests.kits.cells import PAGES, POLICIES, Cell


@dataclasses.dataclass(frozen=True)
class Kit:
    """Tests of one kit that run here.

    Attributes:
        name: of the class in ``tests/kits/classes.py``.
        module: below ``sglang.test.kits``.
        tests: names of its methods.
        options: further options of the server.
        environment: further variables of the server.
        tiers: on which it means something.
        policies: with which it does.
        limits: pages and tier on which it asks for more than this cache, or the device, can give,
            with the reason.
    """

    name: str
    module: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    tiers: tuple[str, ...] = ("device", "host", "storage")
    policies: tuple[str, ...] = POLICIES
    limits: tuple[tuple[tuple[int, ...], str, str], ...] = ()

    def means_something(self, cell: Cell) -> bool:
        """Whether it can be asked of this kind of server."""
        there = cell.tier in self.tiers and cell.policy in self.policies
        return there and self.limit(cell) is None

    def limit(self, cell: Cell) -> str | None:
        """Why it cannot be asked of this kind of server, if it asks for too much."""
        for pages, tier, reason in self.limits:
            if cell.page in pages and cell.tier == tier:
                return reason
        return None


RUN = (
    Kit(
        "Unified",
        "unified_radix_cache_kit",
        (
            "test_multiturn_logprobs_match",
            "test_multiturn_decode_cache_hit_branching",
        ),
    ),
    Kit(
        "Unified",
        "unified_radix_cache_kit",
        ("test_multiturn_prefill_cache_hit_branching",),
        # what one request alone has used is not copied: the device evicts it for good, and as
        # many tokens of it as from the engine's own cache
        policies=("write_through", "write_back"),
        limits=(
            (
                PAGES,
                "device",
                "the conversations are longer than the 12,000 tokens of the device: what it evicts "
                "is gone. The engine's own cache without a host loses turns here as well",
            ),
        ),
    ),
    Kit(
        "TwoPass",
        "unified_radix_cache_kit",
        ("test_l3_prefetch_full_prefix_hit_after_flush",),
        tiers=("storage",),
        # the others have nothing in storage after one request
        policies=("write_through",),
        limits=(
            (
                (1,),
                "storage",
                "storage has whole pages of 16 tokens: 1,008 of the 1,023 tokens come back",
            ),
        ),
    ),
    Kit(
        "KLDivergence",
        "kl_divergence_kit",
        (
            "test_input_output_logprobs_match_prefill_cache_hit",
            "test_input_output_logprobs_match_decode_cache_hit",
        ),
    ),
    Kit("CacheHit", "cache_hit_kit", ("test_multiturn_cache_hit",)),
    Kit("RadixServer", "radix_cache_server_kit", ("test_radix_attention",)),
    Kit("AbortAll", "abort_timeout_kit", ("test_abort_all",)),
    Kit("PauseResume", "pause_generation_kit", ("test_pause_resume_in_place",)),
    Kit(
        "APIContract",
        "basic_api_contract_kit",
        (
            "test_health",
            "test_health_generate",
            "test_get_server_info",
            "test_get_model_info",
            "test_openai_chat_completion",
            "test_openai_completion",
        ),
    ),
    Kit(
        "DecodeCorrectness",
        "basic_decode_correctness_kit",
        (
            "test_determinism_temp_zero",
            "test_max_token_one",
            "test_no_repetition_blowup",
            "test_ascii_ratio",
        ),
    ),
    Kit("SchedulerStress", "basic_scheduler_stress_kit", ("test_long_prompt",)),
    Kit(
        "JSONConstrained",
        "json_constrained_kit",
        ("test_json_generate", "test_json_invalid", "test_json_openai", "test_mix_json_and_other"),
    ),
    Kit("JSONMode", "json_mode_kit", ("test_json_mode_response", "test_json_mode_with_streaming")),
    Kit(
        "RegexConstrained",
        "regex_constrained_kit",
        (
            "test_regex_generate_email",
            "test_regex_generate_greeting",
            "test_regex_generate_number",
            "test_regex_generate_phone",
            "test_regex_generate_date",
            "test_regex_generate_hex_color",
            "test_regex_generate_complex_json",
            "test_regex_generate_custom_log_format",
        ),
    ),
    Kit(
        "EBNFConstrained",
        "ebnf_constrained_kit",
        (
            "test_ebnf_generate_email",
            "test_ebnf_generate_greeting",
            "test_ebnf_generate_number",
            "test_ebnf_generate_phone",
            "test_ebnf_generate_date",
            "test_ebnf_generate_hex_color",
            "test_ebnf_generate_custom_log_format",
            "test_ebnf_generate_all_optional_function_params",
        ),
    ),
    Kit(
        "MatchedStop",
        "matched_stop_kit",
        ("test_finish_stop_str", "test_finish_stop_regex_str", "test_finish_length"),
    ),
    Kit(
        "Anthropic",
        "anthropic_messages_kit",
        (
            "test_tool_result_image_content_conversion",
            "test_simple_messages",
            "test_multi_turn_messages",
            "test_system_message_string",
            "test_system_message_blocks",
            "test_in_messages_system_role",
            "test_max_tokens",
            "test_temperature",
            "test_stop_sequences",
            "test_top_p_and_top_k",
            "test_simple_messages_stream",
            "test_stream_multi_turn",
            "test_stream_with_system",
            "test_error_invalid_max_tokens",
            "test_error_empty_messages",
            "test_error_missing_content_type",
            "test_raw_http_non_streaming",
            "test_raw_http_streaming",
            "test_content_blocks_message",
            "test_count_tokens",
            "test_count_tokens_with_system",
        ),
    ),
    Kit(
        "Logprobs",
        "spec_server_kits",
        (
            "test_logprob_start_len",
            "test_logprob_match",
            "test_logprob_mixed",
            "test_logprob_decode_match_prefill",
            "test_token_ids_logprob_ragged",
        ),
    ),
    Kit("Penalties", "spec_server_kits", ("test_penalty_mixed",)),
    Kit("Features", "spec_server_kits", ("test_request_abort", "test_constrained_decoding")),
    Kit(
        "HiddenStates",
        "spec_server_kits",
        ("test_return_hidden_states",),
        ("--enable-return-hidden-states",),
    ),
    Kit(
        "WaitingTimeout",
        "abort_timeout_kit",
        ("test_waiting_timeout",),
        ("--max-running-requests", "1"),
        (("SGLANG_REQ_WAITING_TIMEOUT", "0.001"),),
    ),
    Kit(
        "RunningTimeout",
        "abort_timeout_kit",
        ("test_running_timeout_no_crash",),
        (),
        (("SGLANG_REQ_RUNNING_TIMEOUT", "3"),),
    ),
)

TRAINED = "asks for right answers: needs a trained model"
SESSIONS = "streaming sessions are refused by name (`--enable-streaming-session`)"
SPECULATION = "asks for a draft that its target takes: needs trained models"
TREE = (
    "looks into the nodes of the engine's own tree; this cache has rows of a table "
    "(`sglang_ext/testing` has its own state machine)"
)
OTHER = "no server, no cache: kernels and layers of other models"
CANNOT = {
    ("unified_radix_cache_kit", "test_gsm8k"): TRAINED,
    ("unified_radix_cache_kit", "test_gsm8k_two_passes"): TRAINED,
    ("basic_decode_correctness_kit", "test_capital_france"): TRAINED,
    ("basic_decode_correctness_kit", "test_basic_math"): TRAINED,
    ("basic_decode_correctness_kit", "test_color_completion"): TRAINED,
    ("basic_scheduler_stress_kit", "test_streaming_response"): TRAINED,
    ("basic_scheduler_stress_kit", "test_concurrent_requests"): TRAINED,
    ("matched_stop_kit", "test_finish_stop_eos"): "asks that the model ends its answer by itself: "
    "needs a trained model",
    ("ebnf_constrained_kit", "test_ebnf_generate_complex_json"): "asks for three members in an "
    "order that its grammar leaves open: needs a trained model",
    ("eval_accuracy_kit", "*"): TRAINED,
    ("lm_eval_kit", "*"): TRAINED,
    ("mmmu_vlm_kit", "*"): TRAINED,
    ("reasoning_kit", "*"): "asks that the model thinks and stops thinking: needs a trained model",
    ("fwd_occupancy_kit", "*"): "measures how busy a GPU is",
    ("perf_bench_kit", "*"): "no tests: reports of benchmarks",
    ("vlm_perf_kit", "*"): "no tests: a benchmark of models that see",
    (
        "prefix_cache_branching_kit",
        "*",
    ): "for recurrent state: asks that the second of three branches "
    "finds nothing; this cache finds the prefix",
    ("pd_parity_kit", "*"): "its fixture starts both servers with RDMA devices; "
    "`tests/e2e/test_disaggregation.py` compares tokens over TCP",
    ("spec_decoding_kit", "*"): SPECULATION,
    ("spec_server_kits", "test_acc_length"): SPECULATION,
    ("spec_server_kits", "test_batch_generation"): SPECULATION,
    ("spec_server_kits", "test_eos_token"): SPECULATION,
    ("spec_server_kits", "test_first_token_finish"): SPECULATION,
    ("spec_server_kits", "test_parity_vs_reference"): SPECULATION,
    ("spec_server_kits", "test_gsm8k"): TRAINED,
    ("spec_server_kits", "test_max_token_one"): TRAINED,
    (
        "spec_server_kits",
        "test_radix_attention",
    ): "the function of radix_cache_server_kit, which runs",
    ("spec_server_kits", "test_grammar_structured_output_no_trailing_tokens"): SPECULATION,
    ("spec_server_kits", "test_grammar_logprob_count_matches_completion_tokens"): SPECULATION,
    ("spec_server_kits", "test_sampling_mask"): SPECULATION,
    ("streaming_session_kit", "*"): SESSIONS,
    ("dsa_metadata_kit", "*"): OTHER,
    ("attention_unittest", "*"): OTHER,
    ("unified_radix_cache", "*"): TREE,
}
"""Why the rest cannot run: (module, test), ``*`` for all of a module."""


def folder() -> Path:
    """Where the installed wheel keeps its kits."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "test" / "kits"


def tests_of(module: Path) -> list[tuple[str, str]]:
    """(class, test) of a kit's file, without importing it."""
    classes = [n for n in ast.parse(module.read_text()).body if isinstance(n, ast.ClassDef)]
    return [
        (kind.name, node.name)
        for kind in classes
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


DEFAULT: dict[Cell, dict[str, tuple[str, ...]]] = {
    Cell(1, "host", "write_back"): {
        "Unified": ("test_multiturn_prefill_cache_hit_branching",),
        "CacheHit": ("test_multiturn_cache_hit",),
    },
    Cell(16, "device"): {
        "APIContract": ("test_health_generate", "test_openai_chat_completion"),
        "Anthropic": ("test_multi_turn_messages", "test_raw_http_streaming"),
        "EBNFConstrained": ("test_ebnf_generate_custom_log_format",),
        "Penalties": ("test_penalty_mixed",),
        "DecodeCorrectness": ("test_determinism_temp_zero", "test_max_token_one"),
    },
    Cell(16, "storage", "write_through"): {
        "TwoPass": ("test_l3_prefetch_full_prefix_hit_after_flush",),
        "Unified": ("test_multiturn_decode_cache_hit_branching",),
        "JSONConstrained": ("test_json_openai", "test_mix_json_and_other"),
        "RegexConstrained": ("test_regex_generate_complex_json",),
        "AbortAll": ("test_abort_all",),
        "Features": ("test_request_abort",),
    },
    Cell(64, "host", "write_through"): {
        "Unified": ("test_multiturn_prefill_cache_hit_branching",),
    },
    Cell(64, "host", "write_through_selective"): {
        "KLDivergence": ("test_input_output_logprobs_match_decode_cache_hit",),
        "Logprobs": ("test_logprob_decode_match_prefill", "test_logprob_start_len"),
        "MatchedStop": ("test_finish_stop_str",),
        "PauseResume": ("test_pause_resume_in_place",),
    },
}
"""What runs without ``--all-kits``: each page, tier and policy, and most kits, once."""

FULL = {
    (Cell(1, "host", "write_back"), "Unified"),
    (Cell(64, "host", "write_through"), "Unified"),
}
"""What of these only ``--full`` runs: what takes longest, of a kit that another page meets."""


def selected(cell: Cell, kit: Kit, test: str) -> bool:
    """Whether it runs without ``--all-kits``."""
    return test in DEFAULT.get(cell, {}).get(kit.name, ())
