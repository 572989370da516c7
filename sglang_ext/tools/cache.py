"""``sglang-ext cache``: what a running server has of a prompt, what stays, what goes.

See docs/cache-control.md for what each call does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from sglang_ext.arguments import Parser, input_file, refusal, share, url
from sglang_ext.planning.table import lines, size

_PATH = "/sglang_ext/cache/"
_NOT_FOUND = 404
_CALLS = {
    "lookup": "say how much of a prompt is in each tier",
    "pin": "keep a prompt on the host, until it is unpinned or everything is flushed",
    "unpin": "pin a prompt no longer",
    "drop": "forget a prompt and what goes on from it, or a namespace",
    "preload": "bring a prompt from storage to the host",
    "quota": "bound what a namespace may have of the host, or list what namespaces have",
}
_SAYS = {
    "lookup": "{tokens:,} tokens: a request finds {found:,}; {device:,} are on the device, "
    "{host:,} on the host, {storage} in storage; {pinned:,} are pinned; their namespace has {has} "
    "of the host{of}",
    "pin": "{pinned:,} tokens are pinned",
    "unpin": "{unpinned:,} tokens are pinned no longer",
    "drop": "{dropped:,} tokens are dropped, {held:,} stay with requests that run",
    "preload": "{read:,} tokens were read; a request finds {found:,}",
    "set": "it has {has} of the host, and may have {may}",
    "clear": "it has {has} of the host, and may have all of it",
    "cleared nothing": "it had no quota; it has {has} of the host",
}
_COUNTS = {
    "lookup": "found",
    "pin": "pinned",
    "unpin": "unpinned",
    "drop": "dropped",
    "preload": "read",
    "set": "bound",
    "clear": "cleared",
    "list": "namespaces",
}
"""What the answer to a call has, whatever else it has."""
_NOT_FOR_NOTHING = ("pin", "unpin", "clear")
"""Calls that fail if they count 0."""


class CallError(Exception):
    """The server did not do it; why, in one line."""


def ask(address: str, call: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """What a server answers to a call.

    Raises:
        CallError: it refuses, or does not answer.
    """
    place = address + _PATH + call
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(place, json=body, headers=headers, timeout=600.0)
    except httpx.HTTPError as error:
        raise CallError(f"{place} did not answer: {error!r}") from error
    if answer.status_code == _NOT_FOUND:
        raise CallError(f"{place} is not there; the server needs SGLANG_EXT_SWA_HICACHE=1")
    try:
        said = answer.json()
    except ValueError:
        said = None
    whole: dict[str, Any] = said if isinstance(said, dict) else {}
    if not answer.is_success or _COUNTS[_kind(call, body)] not in whole:
        other = f"{place} answered with status {answer.status_code}: {answer.text[:80]!r}"
        raise CallError(whole.get("error", other))
    return whole


def _kind(call: str, body: dict[str, Any]) -> str:
    """What a call does, by which its answer is known."""
    if call != "quota":
        return call
    return "set" if "size" in body else "clear" if "clear" in body else "list"


def _quota(text: str) -> tuple[str, str]:
    """A namespace, and what it may have."""
    name, equals, bound = text.rpartition("=")
    if not equals:
        raise refusal(repr(text), "NAMESPACE=20GB or NAMESPACE=25%")
    share(bound)
    return name, bound


def _ids(text: str) -> list[int]:
    try:
        ids = json.loads(text if text.startswith("[") else f"[{text}]")
        good = all(isinstance(token, int) and token >= 0 for token in ids)
    except ValueError:
        good = False
    if not good:
        raise refusal(repr(text), "token ids like 5,17,4")
    whole: list[int] = ids
    return whole


def _ids_file(text: str) -> list[int]:
    return _ids(input_file(text).read_text().strip())


def _text_file(text: str) -> str:
    return Path(input_file(text)).read_text()


def _add_prompt(command: argparse.ArgumentParser, call: str) -> None:
    prompt = command.add_mutually_exclusive_group(required=call != "drop")
    prompt.add_argument("--text", help="the prompt, as /generate takes it")
    prompt.add_argument(
        "--text-file", dest="text", type=_text_file, metavar="FILE", help="the same in a file"
    )
    prompt.add_argument(
        "--ids", dest="input_ids", type=_ids, metavar="IDS", help="its token ids: 5,17,4"
    )
    prompt.add_argument(
        "--ids-file", dest="input_ids", type=_ids_file, metavar="FILE", help="them in a file"
    )
    if call == "unpin":
        prompt.add_argument("--all", action="store_true", help="whatever is pinned")


def _add_quota(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--set",
        type=_quota,
        metavar="NAMESPACE=SIZE",
        help="the requests with this extra_key may have so much of the host memory of a rank, like "
        "20GB or 25%%; without a name those that have none",
    )
    what.add_argument("--clear", metavar="NAMESPACE", help="they may have all of it again")
    what.add_argument("--list", action="store_true", help="what namespaces have, and may have")


def _body(given: dict[str, Any]) -> dict[str, Any]:
    """What is sent, of the arguments that say what a call is about."""
    namespace, clear = given.pop("set", None), given.pop("clear", None)
    if namespace is not None:
        given["extra_key"], given["size"] = namespace
    elif clear is not None:
        given["extra_key"], given["clear"] = clear, True
    named = "size" in given or "clear" in given
    return {
        name: value
        for name, value in given.items()
        if value not in (None, False) and not (named and name == "extra_key" and value == "")
    }


def _listed(answer: dict[str, Any]) -> str:
    rows = []
    for one in answer["namespaces"]:
        name = "requests without a key" if one["extra_key"] is None else one["extra_key"]
        salt = "" if one["cache_salt"] is None else f", salt {one['cache_salt']}"
        rows.append((name + salt, size(one["used"]) + _of(one["bound"])))
    rows.append(("all", size(answer["host"])))
    if answer.get("more"):
        rows.append(("", f"{answer['more']} more namespaces without a quota have some of it"))
    return "\n".join(lines(rows, ""))


def _of(bound: int | None) -> str:
    return "" if bound is None else f", may have {size(bound)}"


def _said(kind: str, answer: dict[str, Any]) -> str:
    """What a call has done, for a reader."""
    if kind == "list":
        return _listed(answer)
    storage, used = answer.get("storage"), answer.get("namespace_bytes", answer.get("used", 0))
    words = {
        **answer,
        "storage": "none" if storage is None else f"{storage:,}",
        "has": size(used),
        "of": _of(answer.get("quota_bytes")),
        "may": size(answer.get("bound", 0)),
    }
    if kind == "clear" and not answer["cleared"]:
        kind = "cleared nothing"
    return _SAYS[kind].format(**words)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: done; 1: it was not, or there was nothing to do it to; 2: an argument is not
    allowed."""
    parser = Parser(prog="sglang-ext cache", description=__doc__)
    commands = parser.add_subparsers(dest="call", required=True)
    for call, text in _CALLS.items():
        command = commands.add_parser(call, help=text, description=text)
        command.add_argument(
            "--url", type=url, required=True, help="of the server, like http://127.0.0.1:30000"
        )
        _add_quota(command) if call == "quota" else _add_prompt(command, call)
        if call != "quota":
            command.add_argument("--extra-key", help="of its requests, if they have one")
        command.add_argument("--cache-salt", help="of its requests, if they have one")
        command.add_argument("--api-key", help="of the server: the admin key if it has one")
        command.add_argument("--json", action="store_true", help="print the server's whole answer")
    given = vars(parser.parse_args(arguments))
    call, address, key = given.pop("call"), given.pop("url"), given.pop("api_key")
    as_json = given.pop("json")
    body = _body(given)
    kind = _kind(call, body)
    try:
        answer = ask(address, call, body, key)
    except CallError as error:
        print(f"sglang-ext cache: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(answer))
    else:
        print(_said(kind, answer))
    return int(kind in _NOT_FOR_NOTHING and not answer[_COUNTS[kind]])
