"""Watch a prompt of yours come back from the host.

    python -m launch.host_hit --url http://127.0.0.1:30000 --file README.md

It asks a running server for the prompt twice, then for other prompts until the device has no room
for yours, then for yours again, and prints where its tokens came from each time.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from launch.server import ONE_EACH
from launch.traffic import tokens
from sglang_ext.arguments import Parser, input_file, url, whole

_ANSWER, _TIMEOUT_S = 8, 600.0
_TOKENS = range(300, 500)
"""Token ids that every vocabulary has, and that are no control tokens."""


def ask(server: httpx.Client, **prompt: Any) -> dict[str, Any]:
    """One short greedy request, which has either ``text`` or ``input_ids``."""
    body = {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": _ANSWER}}
    answer: dict[str, Any] = server.post("/generate", json=body).raise_for_status().json()
    return answer


def tiers(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens from the (device, host)."""
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return details.get("device", 0), details.get("host", 0)


def line(said: str, answer: dict[str, Any], seconds: float) -> str:
    """Where the tokens of a prompt came from."""
    device, host = tiers(answer)
    computed = answer["meta_info"]["prompt_tokens"] - device - host
    return f"{said:18} device {device:6}  host {host:6}  computed {computed:6}  {seconds:6.2f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: tokens came from the host; 1: none did, or the server cannot be asked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", type=url, default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--file", type=input_file, required=True, help="text of your prompt")
    parser.add_argument("--characters", type=whole(1), default=2000, help="of it to send")
    parser.add_argument("--others", type=whole(1), default=20, help="prompts in between")
    parser.add_argument("--tokens", type=whole(1), default=300, help="of each of them")
    args = parser.parse_args(arguments)
    text = args.file.read_text(errors="replace")[: args.characters]
    try:
        with httpx.Client(base_url=args.url, timeout=_TIMEOUT_S, limits=ONE_EACH) as server:
            for said in ("first", "again"):
                _timed(server, said, text)
            for _ in range(args.others):
                ask(server, input_ids=tokens(None, args.tokens, _TOKENS))
            back = _timed(server, "after the others", text)
    except httpx.HTTPError as error:
        said = str(error).partition("\n")[0]
        early = isinstance(error, httpx.ConnectError)
        hint = "; a server listens when its log says that it is fired up" if early else ""
        print(f"{args.url} did not answer: {said}{hint}", file=sys.stderr)
        return 1
    if tiers(back)[1] == 0:
        print("no token came from the host: send more --others, or a longer prompt")
        return 1
    return 0


def _timed(server: httpx.Client, said: str, text: str) -> dict[str, Any]:
    """Ask for the prompt and print a line."""
    begin = time.perf_counter()
    answer = ask(server, text=text)
    print(line(said, answer, time.perf_counter() - begin), flush=True)
    return answer


if __name__ == "__main__":
    sys.exit(main())
