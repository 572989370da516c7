"""Routes of the HTTP server for calls of an operator on the cache; see ``cache_control``.

They are open to whoever may call the engine's own ``/flush_cache``: to those with the admin key if
there is one, else to those with the API key, else to everybody.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ext.adapter.cache_control import METHOD, TokenIds

if TYPE_CHECKING:
    from fastapi import Request
    from fastapi.responses import Response

_SERVER = "sglang.srt.entrypoints.http_server"
PATH = "/sglang_ext/cache/"

Combine = Callable[[Iterable[int]], int]
CALLS: dict[str, Combine] = {"lookup": max, "pin": max, "unpin": sum, "drop": sum, "preload": max}
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
    """

    input_ids: TokenIds | None = None
    text: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    all: bool = False


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
    everything = body.all or (call == "drop" and (body.extra_key or body.cache_salt))
    if not prompts and not everything:
        raise CallError(f"{call} takes {_FOR_ALL.get(call, 'a prompt: input_ids or text')}")
    return body


def combined(call: str, answers: list[dict[str, int | None]]) -> dict[str, Any]:
    """What several DP ranks say; with more than one, what each of them says too, in no order."""
    whole: dict[str, Any] = {}
    for name in answers[0]:
        values = [value for answer in answers if (value := answer[name]) is not None]
        whole[name] = CALLS[call](values) if values else None
    return {**whole, "ranks": answers} if len(answers) > 1 else whole


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
    }
    answers = await tokenizer.dumper_control(DumperControlReqInput(method=METHOD, body=message))
    if refusals := sorted({answer.error for answer in answers if not answer.success}):
        raise CallError("; ".join(refusals))
    said = combined(call, [answer.response[0] for answer in answers])
    return said if tokens is None else {"tokens": len(tokens), **said}
