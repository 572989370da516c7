"""``sglang-ext verify --url http://…``: does a running server return the same tokens
from storage as without?

A random prompt is computed cold, then again from the device, then the device and the host are
flushed and it comes from storage. The answer from storage must be the one from the device: both
compute the same tokens on the same prefix. What others had on the device and the host is gone
then, so the tool asks before it flushes. The cold answer differs from them only where the
engine's arithmetic depends on how a prompt is cut.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from sglang_ext.arguments import Parser, number, url, whole
from sglang_ext.tools import consent

_FLUSH_TRIES, _FLUSH_PAUSE_S = 120, 0.5
_BUSY = 400
"""Status with which the engine refuses to flush for now."""
_FIRST_TOKEN, _TOKENS = 100, 300
"""Token ids that every vocabulary has, and that are no control tokens."""


class UnusableError(Exception):
    """The server cannot be checked; says why."""


class RefusedError(UnusableError):
    """The server answered with an error."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(f"{url} answered with status {status}: {said}")
        self.status = status


class _Server:
    def __init__(self, url: str, timeout_s: float, key: str | None) -> None:
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # a connection that is kept may be one that the server is just closing
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(headers=headers, timeout=timeout_s, limits=limits)

    def post(self, path: str, body: dict[str, Any]) -> str:
        url = self._url + path
        try:
            return self._http.post(url, json=body).raise_for_status().text
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200].split("\n")[0]
            raise RefusedError(url, error.response.status_code, said) from error
        except httpx.HTTPError as error:
            raise UnusableError(f"{url} did not answer: {error!r}") from error

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        said = self.post("/generate", body)
        try:
            answer: dict[str, Any] = json.loads(said)
            _cached(answer)
            list(answer["output_ids"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableError(
                f"{self._url}/generate did not answer as an engine does: {said[:80]!r}"
            ) from error
        return answer

    def flush(self) -> bool:
        """Empty device and host; the server refuses as long as it is writing to storage."""
        for _ in range(_FLUSH_TRIES):
            try:
                self.post("/flush_cache", {})
            except RefusedError as error:
                if error.status != _BUSY:
                    raise
                time.sleep(_FLUSH_PAUSE_S)
            else:
                return True
        return False


def _cached(answer: dict[str, Any]) -> dict[str, int]:
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return {tier: int(details.get(tier, 0)) for tier in ("device", "host", "storage")}


def _verify_one(server: _Server, prompt: list[int], count: int) -> list[str]:
    """What is wrong with one prompt; prints one line for it."""
    cold = server.generate(prompt, count)
    device = server.generate(prompt, count)
    if not server.flush():
        return ["the server does not flush: it is busy, or storage does not take what it gets"]
    stored = server.generate(prompt, count)
    tiers, tokens = _cached(stored), stored["output_ids"]
    problems = []
    if any(_cached(cold).values()):
        problems.append("the prompt was in the cache before")
    if "storage" not in (stored["meta_info"].get("cached_tokens_details") or {}):
        problems.append(
            "no token came from storage: the server has none; start it with "
            "--hicache-storage-backend"
        )
    elif tiers["storage"] == 0:
        problems.append("no token came from storage")
    if tiers["device"] or tiers["host"]:
        problems.append("the flush left something on the device or the host")
    if tokens != device["output_ids"]:
        problems.append("the answer from storage is another one than from the device")
    same = "the same" if tokens == cold["output_ids"] else "not the same"
    print(
        f"{len(prompt)} tokens: {tiers['storage']} from storage, answer {same} as cold"
        + "".join(f"; {problem}" for problem in problems)
    )
    return problems


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: everything came back from storage, token for token; 1: it did not, or the
    server cannot be asked; 2: an argument is not allowed, or nobody agreed to the flushes."""
    parser = Parser(prog="sglang-ext verify", description=__doc__)
    parser.add_argument(
        "--url", type=url, required=True, help="of the server, like http://127.0.0.1:30000"
    )
    parser.add_argument("--prompts", type=whole(1), default=4)
    parser.add_argument("--tokens", type=whole(1), default=2000, help="of each prompt")
    parser.add_argument("--answer", type=whole(1), default=32, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; random if none")
    parser.add_argument("--api-key", help="of the server, or its admin key; needed to flush")
    parser.add_argument(
        "--timeout", type=number(above=0), default=600.0, help="seconds for one request"
    )
    consent.add_option(parser)
    args = parser.parse_args(arguments)
    consent.require(parser, args.url, agreed=args.yes)
    rng = random.Random(args.seed)
    server = _Server(args.url, args.timeout, args.api_key)
    problems: list[str] = []
    try:
        for _ in range(args.prompts):
            prompt = [_FIRST_TOKEN + rng.randrange(_TOKENS) for _ in range(args.tokens)]
            problems += _verify_one(server, prompt, args.answer)
    except UnusableError as error:
        problems.append(str(error))
    for problem in dict.fromkeys(problems):
        print(f"PROBLEM: {problem}", file=sys.stderr)
    print("FAILED" if problems else "OK: from storage as without, token for token")
    return 1 if problems else 0
