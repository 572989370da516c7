"""The bench for a GPU: how it tells a wrong answer from rounding, and all of it at small size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.bench.gpu import exact
from launch.bench.gpu.exact import Asked, Said
from launch.traffic import Traffic

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "launch" / "requirements"
TRAFFIC = Traffic(conversations=3, rounds=2, parallel=2)


class Server:
    """Stands in for one: an answer is a function of the prompt, as long as nothing is spoilt.

    Args:
        spoilt: prompts of this round of conversations and later ones get another answer.
        noise: what its log-probabilities are off by.
    """

    def __init__(self, spoilt: int = 99, noise: float = 0.0) -> None:
        self._spoilt, self._noise = spoilt, noise
        self._count = 0

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        prompt = list(body["input_ids"])
        self._count += 1
        wrong = self._count > self._spoilt * TRAFFIC.conversations
        length = body["sampling_params"]["max_new_tokens"]
        tokens = [(sum(prompt) + n + wrong) % 512 for n in range(length)]
        logprob = -1.0 - wrong + self._noise
        return {
            "output_ids": tokens,
            "meta_info": {
                "prompt_tokens": len(prompt),
                "cached_tokens_details": {"device": 16, "host": 32},
                "num_retractions": 1,
                "output_token_logprobs": [[logprob, token, None] for token in tokens],
            },
        }


def followed(server: Any) -> dict[str, float]:
    """How far a server is from one without a cache."""
    first: Any = Server()
    return exact.follow(server, exact.write_script(first, TRAFFIC), parallel=2)


def test_the_same_answers_are_equal() -> None:
    found = followed(Server())
    assert (found["answers"], found["different"]) == (6, 0)
    assert found["logprob_largest"] == 0
    assert (found["host"], found["device"], found["retractions"]) == (6 * 32, 6 * 16, 6)
    assert exact.verdict(found, found, deterministic=True) == "equal"


def test_a_wrong_round_is_counted_and_no_rounding() -> None:
    found, noise = followed(Server(spoilt=1)), followed(Server(noise=0.01))
    assert found["different"] == 3
    assert noise["logprob_largest"] == pytest.approx(0.01)
    assert not exact.is_rounding(found, noise)
    for deterministic in (True, False):
        assert exact.verdict(found, noise, deterministic=deterministic) == "different"


def test_rounding_is_excused_where_nothing_is_deterministic() -> None:
    noise = {"logprob_mean": 0.01, "logprob_largest": 0.05}
    found = {"host": 1, "different": 1, "logprob_mean": 0.015, "logprob_largest": 0.06}
    assert exact.verdict(found, noise, deterministic=False) == "rounding"
    assert exact.verdict(found, noise, deterministic=True) == "different"


def test_a_server_that_reads_no_host_proves_nothing() -> None:
    found = {"host": 0, "different": 0}
    assert exact.verdict(found, found, deterministic=True) == "nothing came from the host"


def test_a_server_that_was_to_retract_and_did_not_proves_nothing() -> None:
    found = {"host": 1, "different": 0, "retractions": 0}
    said = exact.verdict(found, found, deterministic=True, retracts=True)
    assert said == "no request was retracted"
    assert exact.verdict(found, found, deterministic=True) == "equal"


def test_when_time_is_over_no_round_is_begun() -> None:
    first: Any = Server()
    left = iter([True, False])
    assert len(exact.write_script(first, TRAFFIC, lambda: next(left))) == 1
    script = exact.write_script(first, TRAFFIC)
    left = iter([True, False])
    second: Any = Server()
    found = exact.follow(second, script, 2, lambda: next(left))
    assert (found["rounds"], found["answers"]) == (1, TRAFFIC.conversations)


def test_what_follows_another_token_is_not_compared() -> None:
    asked = Asked((1,), 3, Said((7, 8, 9), (-1.0, -1.0, -1.0)))
    found = exact.differences([asked], [Said((7, 5, 9), (-1.0, -1.5, -9.0))])
    assert (found["different"], found["logprob_largest"]) == (1, 0.5)


def _pins(name: str) -> list[str]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_what_is_carried_is_what_the_tests_ran_with() -> None:
    pins = _pins("gpu.txt")
    engine = [pin for pin in pins if pin.startswith("sglang==")]
    assert engine == [f"sglang=={_engine_version()}"]
    assert set(pins) - set(engine) <= set(_pins("cpu.txt"))


def _engine_version() -> str:
    lines = (ROOT / "Makefile").read_text().splitlines()
    return next(line for line in lines if line.startswith("ENGINE :=")).split()[-1]
