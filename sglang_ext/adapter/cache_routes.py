"""Routes of the HTTP server for calls of an operator on the cache; see ``cache_control``.

They are open to whoever may call the engine's own ``/flush_cache``: to those with the admin key if
there is one, else to those with the API key, else to everybody.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ext.adapter.cache_control import METHOD, Answer, TokenIds
from sglang_ext.arguments import share

if TYPE_CHECKING:
    from fastapi import Request
    from fastapi.responses import Response

_SERVER = "sglang.srt.entrypoints.http_server"
PATH = "/sglang_ext/cache/"

Combine = Callable[[Iterable[int]], int]
CALLS: dict[str, Combine] = {
    "lookup": max,
    "pin": max,
    "unpin": sum,
    "drop": sum,
    "preload": max,
    "quota": max,
}
"""Each call, and what the answers of several DP ranks are in all: each has its own cache, and a
prompt is in one of them, or in some."""
_FOR_ALL = {
    "drop": "a prompt, or a namespace by extra_key or cache_salt; /flush_cache drops everything",
    "unpin": 'a prompt, or "all": true',
}


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """What a call is about.

    Attributes:
        input_ids, text: a prompt, one of them; the text as ``/generate`` takes it.
        extra_key, cache_salt: of its requests.
        all: of ``unpin``, in place of a prompt.
        size, clear, list: of ``quota``, one of them, in place of a prompt.
    """

    input_ids: TokenIds | None = None
    text: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    all: bool = False
    size: str | None = None
    clear: bool = False
    list: bool = False

    @property
    def quota(self) -> dict[str, Any] | None:
        """What is asked of a quota; None for other calls.

        Raises:
            ArgumentTypeError: the size is none.
        """
        if self.size is not None:
            count, percent = share(self.size)
            return {"action": "set", "bytes": count, "percent": percent}
        if self.clear or self.list:
            return {"action": "clear" if self.clear else "list"}
        return None


class CallError(ValueError):
    """A call that makes no sense; why, in one line."""


def parse(call: str, text: bytes) -> Body:
    """The body of a call.

    Raises:
        CallError: it is not one.
    """
    try:
        body = msgspec.json.decode(text, type=Body)
    except msgspec.DecodeError as error:
        raise CallError(f"{call}: {error}") from None
    prompts = (body.input_ids is not None) + (body.text is not None)
    if prompts == 2:
        raise CallError(f"{call} takes input_ids or text, not both")
    if body.all and (call != "unpin" or prompts):
        raise CallError(f'{call} does not take "all" here')
    _check_quota(call, body, prompts)
    if call == "quota":
        return body
    everything = body.all or (call == "drop" and (body.extra_key or body.cache_salt))
    if not prompts and not everything:
        raise CallError(f"{call} takes {_FOR_ALL.get(call, 'a prompt: input_ids or text')}")
    return body


def _check_quota(call: str, body: Body, prompts: int) -> None:
    """Raises CallError: a quota is asked for in a way that makes no sense."""
    asked = (body.size is not None) + body.clear + body.list
    if call != "quota":
        if asked:
            raise CallError(f'{call} does not take "size", "clear" or "list"')
        return
    if prompts or asked != 1:
        raise CallError('quota takes "size", "clear": true or "list": true, and no prompt')
    if body.list and (body.extra_key or body.cache_salt):
        raise CallError('quota takes no namespace with "list"')
    try:
        _ = body.quota
    except argparse.ArgumentTypeError as error:
        raise CallError(f"quota: size {error}") from None


def combined(call: str, answers: list[Answer]) -> dict[str, Any]:
    """What several DP ranks say; with more than one, what each of them says too, in no order."""
    whole: dict[str, Any] = {}
    for name in answers[0]:
        values = [value for answer in answers if (value := answer[name]) is not None]
        if values and isinstance(values[0], list):
            whole[name] = _of_namespaces(call, values)
            continue
        whole[name] = CALLS[call](values) if values else None
    return {**whole, "ranks": answers} if len(answers) > 1 else whole


def _of_namespaces(call: str, lists: list[list[Answer]]) -> list[dict[str, Any]]:
    """Lists of namespaces of several DP ranks as one."""
    by_name: dict[Any, list[Answer]] = {}
    for listed in lists:
        for one in listed:
            by_name.setdefault((one["extra_key"], one["cache_salt"]), []).append(one)
    merged = []
    for (extra_key, cache_salt), ones in by_name.items():
        bounds = [one["bound"] for one in ones if one["bound"] is not None]
        used = CALLS[call](one["used"] for one in ones)
        bound = CALLS[call](bounds) if bounds else None
        merged.append(
            {"extra_key": extra_key, "cache_salt": cache_salt, "used": used, "bound": bound}
        )
    return merged


def add_routes(_: None, tokenizer: Any) -> None:
    """Have the HTTP server of this process take the calls, if it has one."""
    if _SERVER not in sys.modules:
        return

    from sglang.srt.utils.auth import AuthLevel, auth_level

    app = sys.modules[_SERVER].app
    for call in CALLS:
        route = _route(tokenizer, call)
        auth_level(AuthLevel.ADMIN_OPTIONAL)(route)
        app.add_api_route(PATH + call, route, methods=["POST"], include_in_schema=False)


def _route(tokenizer: Any, call: str) -> Callable[..., Any]:
    from fastapi import Request

    async def route(request: Request) -> Any:
        return await _answer(tokenizer, call, request)

    return route


async def _answer(tokenizer: Any, call: str, request: "Request") -> "Response":
    from fastapi.responses import JSONResponse

    try:
        return JSONResponse(await _ask(tokenizer, call, parse(call, await request.body())))
    except CallError as error:
        return JSONResponse({"error": str(error)}, 400)


async def _ask(tokenizer: Any, call: str, body: Body) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import DumperControlReqInput
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().pp_size > 1:
        raise CallError("not with --pp-size: stages would do it in different steps")
    tokens = body.input_ids
    if body.text is not None:
        try:
            tokens, _ = await tokenizer._tokenize_texts(body.text)
        except ValueError as error:  # there is no tokenizer
            raise CallError(f"{call} does not take text here: {error}") from None
    message = {
        "call": call,
        "input_ids": tokens,
        "extra_key": body.extra_key,
        "cache_salt": body.cache_salt,
        "quota": body.quota,
    }
    answers = await tokenizer.dumper_control(DumperControlReqInput(method=METHOD, body=message))
    if refusals := sorted({answer.error for answer in answers if not answer.success}):
        raise CallError("; ".join(refusals))
    said = combined(call, [answer.response[0] for answer in answers])
    return said if tokens is None else {"tokens": len(tokens), **said}
