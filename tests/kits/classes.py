"""SGLang's kits, each with what it needs of a server here. Imports the engine: loaded late."""

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
from sglang.test import kl_test_utils
from sglang.test.kits.abort_timeout_kit import (
    AbortAllMixin,
    RunningTimeoutTwoWaveMixin,
    WaitingTimeoutMixin,
)
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.json_mode_kit import JSONModeMixin
from sglang.test.kits.kl_divergence_kit import KLDivergenceMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.radix_cache_server_kit import run_radix_attention_test
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin
from sglang.test.kits.spec_server_kits import (
    SpecFeatureKit,
    SpecHiddenStatesKit,
    SpecLogprobKit,
    SpecPenaltyKit,
)
from sglang.test.kits.unified_radix_cache_kit import AccuracyTwoPassMixin, UnifiedRadixTreeTestMixin
from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase

from launch.models.text import COMMON
from tests.kits.servers import OnServer, random_prompts


class Unified(UnifiedRadixTreeTestMixin, OnServer):
    """Nine branches of three prompts, three turns of each; cached tokens to the token."""

    max_new_tokens = 64
    kl_threshold = 1e-6  # float32


class TwoPass(AccuracyTwoPassMixin, OnServer):
    """A prompt of whole pages comes back from storage after a flush."""

    def setUp(self) -> None:
        """A prompt of 1,024 tokens."""
        self.l3_prefetch_page_size = self.cell.page
        self.l3_prefetch_prompt_pages = 1024 // self.cell.page


class KLDivergence(KLDivergenceMixin, OnServer):
    """Log-probabilities of hits against a prefill without a cache."""

    kl_div_thres = 1e-6
    kl_div_max_samples = 8
    kl_div_prefill_max_new_tokens = 64
    kl_div_decode_max_new_tokens = 64

    @classmethod
    def setUpClass(cls) -> None:
        """Random prompts in the place of the data set."""
        key = f"{cls.model}_{kl_test_utils.DEFAULT_PROMPT_TOKENS}_{48}"
        kl_test_utils._cached_input_ids[key] = random_prompts(8, 700, seed=3)


class RadixServer(OnServer):
    """400 nodes of a random tree of prompts, in one request."""

    def test_radix_attention(self) -> None:
        """The kit's function."""
        run_radix_attention_test(self.base_url)
        assert self.process.poll() is None


class CacheHit(OnServer):
    """Turns of eight clients: each finds what the one before has computed."""

    def test_multiturn_cache_hit(self) -> None:
        """The kit's function, with a data set of common words."""
        run_multiturn_cache_hit_test(
            self.base_url, self.model, dataset_path=str(self._dialogues()), max_parallel=8
        )

    def _dialogues(self) -> Path:
        path = self.scratch / "dialogues.json"
        words = [" ".join(COMMON[n:] + COMMON[:n]) for n in range(64)]
        path.write_text(json.dumps([{"conversations": [{"value": w}] * 2} for w in words]))
        return path


class AbortAll(AbortAllMixin, OnServer):
    """All requests are aborted in the middle of their answers: none comes later than that."""

    abort_all_sleep = 6


class WaitingTimeout(WaitingTimeoutMixin, OnServer):
    """A request waits too long."""


class RunningTimeout(RunningTimeoutTwoWaveMixin, OnServer):
    """Requests run too long."""


class PauseResume(PauseResumeInPlaceMixin, OnServer):
    """Generation is paused in place."""

    pause_ignore_eos = True
    pause_num_requests = 8
    # none ends just when the pause begins
    pause_max_new_tokens = 512
    pause_duration = 1


class APIContract(BasicAPIContractMixin, OnServer):
    """Health, information, OpenAI's endpoints."""


class DecodeCorrectness(BasicDecodeCorrectnessMixin, OnServer):
    """What needs no trained model of it."""


class SchedulerStress(BasicSchedulerStressMixin, OnServer):
    """What needs no trained model of it."""


class JSONConstrained(JSONConstrainedMixin, OnServer):
    """Answers by a schema."""


class JSONMode(JSONModeMixin, OnServer):
    """Answers that are any JSON."""


class RegexConstrained(RegexConstrainedMixin, OnServer):
    """Answers by a regular expression."""


class EBNFConstrained(EBNFConstrainedMixin, OnServer):
    """Answers by a grammar."""


class MatchedStop(MatchedStopMixin, OnServer):
    """Stop strings."""


class Anthropic(AnthropicMessagesMixin, OnServer):
    """Anthropic's messages."""


class Logprobs(SpecLogprobKit, OnServer):
    """Log-probabilities of prompts, from the start and from inside."""

    logprob_match_delta = 1e-3


class Penalties(SpecPenaltyKit, OnServer):
    """Penalties beside each other."""

    run_decode = SpecEagleServerBase.run_decode


class Features(SpecFeatureKit, OnServer):
    """Clients that go away beside others that stay; JSON answers."""

    def send_request(self) -> None:
        """A client that stays. The kit's own asks for ten thousand tokens."""
        for prompt in random_prompts(3, 200, seed=5):
            assert self._ask(prompt, 32, None)["meta_info"]["completion_tokens"] == 32

    def send_requests_abort(self) -> None:
        """A client that goes away."""
        for prompt in random_prompts(3, 200, seed=6):
            with contextlib.suppress(httpx.TimeoutException):
                self._ask(prompt, 2000, 0.3)

    def _ask(self, prompt: list[int], length: int, timeout_s: float | None) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(self.base_url + "/generate", json=body, timeout=timeout_s)
        return answer.json()


class HiddenStates(SpecHiddenStatesKit, OnServer):
    """Hidden states of answers."""
