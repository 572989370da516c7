"""Answers to grade-school questions, cold, from the host and from storage, of a running server.

    python -m launch.accuracy --url http://127.0.0.1:30000 --data test.jsonl --yes

``--data`` has a JSON object a line with ``question`` and ``answer``, and behind ``####`` at the end
of an answer the number that is right, as in GSM8K. The first lines are examples that every prompt
begins with. Decoding is greedy, so what is found in a cache must not change an answer.

A pass asks all questions. Before the first one, device and host are flushed for all users of the
server, which somebody has to agree to (``--yes``). Before the one from the host, prompts that
nobody asks for again fill the device. Before the one from storage, device and host are flushed
again; it is left out if the server has no storage.
"""

import argparse
import dataclasses
import decimal
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from launch.bench.multiturn import distribution
from launch.server import ONE_EACH
from launch.traffic import tokens
from sglang_ext.arguments import Parser, input_file, number, output_file, url, whole
from sglang_ext.tools import consent

STOPS = ("Question", "Assistant:", "<|separator|>")
"""A base model goes on with the next question."""
TIERS = ("device", "host", "storage")
COLD, HOST, STORAGE = "cold", "host", "storage"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FILLER, _FILLER_IDS = 1024, range(300, 500)
"""Tokens of a prompt that fills the device, of ids that every vocabulary has."""
_FLUSH_TRIES, _FLUSH_PAUSE_S, _BUSY = 240, 0.5, 400


class UnusableError(Exception):
    """The data or the server cannot be used; why, in one line."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and the number that is right."""

    number: int
    prompt: str
    right: decimal.Decimal


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server said to a question.

    Attributes:
        ids: tokens of ``text``.
        prompt: tokens of the prompt.
        found: tokens of the prompt by tier. Where something was found, of all tiers that the
            server has.
    """

    text: str
    ids: tuple[int, ...]
    prompt: int
    found: Mapping[str, int]
    latency_s: float


def value_of(text: str) -> decimal.Decimal | None:
    """The last number of an answer; None if there is none."""
    found = _NUMBER.findall(text)
    return decimal.Decimal(found[-1].replace(",", "")) if found else None


def read_questions(path: Path, shots: int, count: int | None) -> list[Question]:
    """The questions behind the examples.

    Args:
        shots: lines that are examples.
        count: of questions, all if None.

    Raises:
        UnusableError: a line is none, or there are not enough of them.
    """
    solved = []
    for number_, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            question, answer = str(found["question"]), str(found["answer"])
        except (ValueError, KeyError, TypeError):
            question = answer = ""
        right = value_of(answer.partition("####")[2])
        if right is None:
            raise UnusableError(
                f"{path}, line {number_}: allowed is an object with question and answer, and "
                "'#### NUMBER' at the end of the answer"
            )
        solved.append((f"Question: {question}\nAnswer:", answer, right))
    if len(solved) <= shots:
        raise UnusableError(f"{path}: {len(solved)} lines leave no question for {shots} examples")
    prefix = "".join(f"{asked} {answer}\n\n" for asked, answer, _ in solved[:shots])
    asked = solved[shots:][:count]
    return [Question(n, prefix + text, right) for n, (text, _, right) in enumerate(asked)]


class Asked:
    """A running server."""

    def __init__(self, address: str, key: str | None, timeout_s: float, longest: int) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._address = address
        self._longest = longest
        self._http = httpx.Client(
            base_url=address, headers=headers, timeout=timeout_s, limits=ONE_EACH, trust_env=False
        )

    def answer(self, question: Question) -> Answer:
        """Ask, greedily."""
        sampling = {"temperature": 0, "max_new_tokens": self._longest, "stop": list(STOPS)}
        start = time.perf_counter()
        said = self._post("/generate", {"text": question.prompt, "sampling_params": sampling})
        latency = time.perf_counter() - start
        try:
            meta = said["meta_info"]
            found = meta.get("cached_tokens_details") or {}
            return Answer(
                said["text"],
                tuple(said["output_ids"]),
                meta["prompt_tokens"],
                {tier: int(found[tier]) for tier in TIERS if tier in found},
                latency,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UnusableError(
                f"{self._address}/generate did not answer as an engine does: {said!r:.80}"
            ) from error

    def flush(self) -> None:
        """Empty device and host; the server refuses as long as it is busy or writes to storage."""
        for _ in range(_FLUSH_TRIES):
            answer = self._request("POST", "/flush_cache", {})
            if not answer.is_error:
                return
            if answer.status_code != _BUSY:
                said = answer.text.partition("\n")[0]
                raise UnusableError(
                    f"{self._address} does not flush: status {answer.status_code}: {said:.200}"
                )
            time.sleep(_FLUSH_PAUSE_S)
        raise UnusableError(f"{self._address} does not flush: it is busy")

    def fill(self, clients: int) -> None:
        """Take the device from everything else, with prompts that nobody asks for again."""
        info = self._decoded("/server_info", self._request("GET", "/server_info"))
        try:
            size = int(info["max_total_num_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableError(
                f"{self._address}/server_info does not tell max_total_num_tokens"
            ) from error
        length = min(_FILLER, max(size // 4, 1))
        sampling = {"temperature": 0, "max_new_tokens": 1}

        def send(_: int) -> None:
            prompt = tokens(None, length, _FILLER_IDS)
            self._post("/generate", {"input_ids": prompt, "sampling_params": sampling})

        # a few at once: what runs together is not evicted
        with ThreadPoolExecutor(min(clients, 4)) as pool:
            list(pool.map(send, range(-(-size * 5 // (4 * length)))))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._decoded(path, self._request("POST", path, body))

    def _decoded(self, path: str, answer: httpx.Response) -> Any:
        said = answer.text.partition("\n")[0]
        if answer.is_error:
            raise UnusableError(
                f"{self._address}{path} answered with status {answer.status_code}: {said:.200}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise UnusableError(f"{self._address}{path} answered {said!r:.80}, no JSON") from error

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise UnusableError(f"{self._address}{path} did not answer: {error!r:.200}") from error


def ask_all(
    server: Asked, questions: Sequence[Question], clients: int
) -> tuple[list[Answer], float]:
    """One pass: the answers, in the order of the questions, and its seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(server.answer, questions))
    return answers, time.perf_counter() - start


def figures(
    questions: Sequence[Question], answers: Sequence[Answer], seconds: float
) -> dict[str, Any]:
    """Accuracy, speed and found tokens of a pass."""
    values = [value_of(answer.text) for answer in answers]
    right = sum(v == question.right for v, question in zip(values, questions, strict=True))
    prompt = sum(answer.prompt for answer in answers)
    output = sum(len(answer.ids) for answer in answers)
    return {
        "accuracy": right / len(questions),
        "invalid": values.count(None) / len(questions),
        "latency_s": seconds,
        "output_tokens_per_s": output / seconds,
        "input_tokens_per_s": prompt / seconds,
        "request_latency_s": distribution([answer.latency_s for answer in answers]),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "found_tokens": {tier: sum(a.found.get(tier, 0) for a in answers) for tier in TIERS},
    }


def differences(
    questions: Sequence[Question], passes: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """Every answer that is not that of the first pass, with both."""
    first, *others = passes
    return [
        {
            "question": question.number,
            "passes": [first, name],
            "answers": [passes[first][n].text, passes[name][n].text],
        }
        for name in others
        for n, question in enumerate(questions)
        if (passes[first][n].text, passes[first][n].ids)
        != (passes[name][n].text, passes[name][n].ids)
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", type=url, default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--data", type=input_file, required=True, help="questions, JSON lines")
    parser.add_argument("--shots", type=whole(0), default=5, help="examples in each prompt")
    parser.add_argument("--questions", type=whole(1), help="that are asked, all if not given")
    parser.add_argument("--parallel", type=whole(1), default=32, help="questions at a time")
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="of an answer")
    parser.add_argument(
        "--passes", nargs="+", choices=[COLD, HOST, STORAGE], help="all that the server can"
    )
    parser.add_argument(
        "--allow", type=whole(0), default=0, help="answers that may differ, for kernels that vary"
    )
    parser.add_argument("--api-key", help="of the server, or its admin key; needed to flush")
    parser.add_argument("--timeout", type=number(above=0), default=600.0, help="seconds, a request")
    parser.add_argument("--out", type=output_file, default=Path("out/accuracy.json"))
    consent.add_option(parser)
    args = parser.parse_args(argv)
    consent.require(parser, args.url, agreed=args.yes)
    return args


def run(args: argparse.Namespace, server: Asked, questions: Sequence[Question]) -> dict[str, Any]:
    """All passes: their figures, the answers that differ, and what is wrong with a pass."""
    passes: dict[str, list[Answer]] = {}
    report: dict[str, Any] = {"questions": len(questions), "shots": args.shots, "passes": {}}
    for name in args.passes or (COLD, HOST, STORAGE):
        known = {tier for answers in passes.values() for answer in answers for tier in answer.found}
        if name == STORAGE and args.passes is None and STORAGE not in known:
            continue  # the server has none
        if name == HOST:
            server.fill(args.parallel)
        else:
            server.flush()
        passes[name], seconds = ask_all(server, questions, args.parallel)
        report["passes"][name] = figures(questions, passes[name], seconds)
        print_pass(name, report["passes"][name])
    report["differences"] = differences(questions, passes)
    report["faults"] = [
        f"pass {name}: no token came from {name}"
        for name in passes
        if name != COLD and not report["passes"][name]["found_tokens"][name]
    ]
    return report


def print_pass(name: str, found: Mapping[str, Any]) -> None:
    """The lines that SGLang's own evaluation prints."""
    print(f"pass: {name}")
    print(f"Accuracy: {found['accuracy']:.3f}")
    print(f"Invalid: {found['invalid']:.3f}")
    print(f"Latency: {found['latency_s']:.3f} s")
    print(f"Output throughput: {found['output_tokens_per_s']:.3f} token/s", flush=True)


def print_table(report: Mapping[str, Any]) -> None:
    """A row for each pass, then every answer that differs, then what is wrong."""
    found = [f"found {tier}" for tier in TIERS]
    header = ["pass", "accuracy", "invalid", "latency, s", "output/s", "prompt tokens", *found]
    print("\n" + header[0].ljust(9) + "".join(f"{name:>15}" for name in header[1:]))
    for name, row in report["passes"].items():
        cells = [f"{row['accuracy']:.3f}", f"{row['invalid']:.3f}", f"{row['latency_s']:.2f}"]
        cells += [f"{row['output_tokens_per_s']:.1f}", f"{row['prompt_tokens']:,}"]
        cells += [f"{row['found_tokens'][tier]:,}" for tier in TIERS]
        print(name.ljust(9) + "".join(f"{cell:>15}" for cell in cells))
    print(f"\n{len(report['differences'])} answers differ")
    for each in report["differences"]:
        print(f"question {each['question']}:")
        for name, text in zip(each["passes"], each["answers"], strict=True):
            print(f"  {name}: {text!r}")
    for fault in report["faults"]:
        print(f"FAULT: {fault}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: the answers of all passes are the same; 1: more differ than may; 2: an
    argument is not allowed; 3: the data or the server cannot be used, or a pass found nothing in
    the tier that it is named for."""
    args = parse_args(argv)
    try:
        questions = read_questions(args.data, args.shots, args.questions)
        server = Asked(args.url, args.api_key, args.timeout, args.max_new_tokens)
        report = run(args, server, questions)
    except UnusableError as error:
        print(error, file=sys.stderr)
        return 3
    print_table(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {args.out}")
    if len(report["differences"]) > args.allow:
        return 1
    return 3 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
