"""Calls of an operator on the cache: what a prompt has, what stays, what goes.

They come as messages that the engine has for its dumper, which have a name and a JSON body, so no
process between the HTTP server and the schedulers has to know them. The engine brings them to all
ranks in the same step, and what they do follows from the table alone, so ranks agree. A call that
has to wait goes on in later steps. Each DP rank answers for itself; see ``cache_routes``.
"""

from collections.abc import Callable, Generator, Hashable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from sglang_ext.config import PINNED_SHARE
from sglang_ext.core.plan import Declined, DeclineReason, Transfer, TransferKind
from sglang_ext.core.table.digest import Pages
from sglang_ext.core.table.paths import Page
from sglang_ext.core.table.table import STORED

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import DumperControlReqInput, DumperControlReqOutput

    from sglang_ext.adapter.prefix_cache import SwaHiCache

METHOD = "sglang_ext.cache"
"""Name of the messages."""
_MOST_TRIES = 1000
"""Steps in which a pin waits for other copies to end."""

_MOST_STEPS = 1000
"""In which a call waits for what is beyond a new quota to go."""

_MOST_OTHERS = 100
"""Namespaces without a quota that a list has."""

Answer = dict[str, Any]
Steps = Generator[None, None, Answer]
"""A call: one piece for each step, then its answer."""


class RefusedError(Exception):
    """A call that is not done; why, in one line."""


TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]]
"""Those of a prompt, in JSON."""


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of the quota of a namespace.

    Attributes:
        action: whether it gets one, has one no longer, or all are listed.
        bytes, percent: of the host memory of a rank; one of them if it gets one.
    """

    action: Literal["set", "clear", "list"]
    bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] | None = None
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a message.

    Attributes:
        call: which one.
        input_ids: a prompt; None for all of a namespace, or for everything.
        extra_key, cache_salt: of its requests.
        quota: of the call of this name.
    """

    call: Literal["lookup", "pin", "unpin", "drop", "preload", "quota"]
    input_ids: TokenIds | None
    extra_key: str | None
    cache_salt: str | None
    quota: Quota | None = None


class _Prompt(NamedTuple):
    """What a call is about.

    Attributes:
        tokens: (n,) int64; None for all of a namespace.
        quota: None but for that call.
    """

    tokens: Page | None
    pages: Pages
    namespace: Hashable
    quota: Quota | None


class CacheControl:
    """The calls of one rank, and those that have not ended."""

    def __init__(self, cache: "SwaHiCache") -> None:
        self._cache = cache
        self._calls: dict[str, Callable[[_Prompt], Steps]] = {
            "lookup": self._look_up,
            "pin": self._pin,
            "unpin": self._unpin,
            "drop": self._drop,
            "preload": self._preload,
            "quota": self._quota,
        }
        self._waiting: list[tuple[DumperControlReqInput, Steps]] = []

    def begin(self, request: "DumperControlReqInput") -> "DumperControlReqOutput | None":
        """The answer of a call; None: it comes later."""
        try:
            message = msgspec.convert(request.body, Message)
        except msgspec.ValidationError as error:
            # the engine has a route for its dumper that takes any name and body
            return _refused(f"{METHOD}: {error}")
        steps = self._calls[message.call](self._prompt(message))
        answer = _step(steps)
        if answer is None:
            self._waiting.append((request, steps))
        return answer

    def look(self) -> "list[tuple[DumperControlReqOutput, DumperControlReqInput]]":
        """Let calls that wait go on; answers, and what they answer. Once a step."""
        ended = [(_step(steps), request, steps) for request, steps in self._waiting]
        self._waiting = [(request, steps) for answer, request, steps in ended if answer is None]
        return [(answer, request) for answer, request, _ in ended if answer is not None]

    def _prompt(self, message: Message) -> _Prompt:
        given, namespace = message.input_ids, (message.extra_key, message.cache_salt)
        tokens = np.array([] if given is None else given, dtype=np.int64)
        pages = self._cache.keys.pages(tokens, len(tokens))
        return _Prompt(None if given is None else tokens, pages, namespace, message.quota)

    def _tokens(self, pages: int) -> int:
        return pages * self._cache.index.geometry.page_tokens

    # ---- calls -----------------------------------------------------------------

    def _look_up(self, prompt: _Prompt) -> Steps:
        storage = yield from self._in_storage(prompt)
        index = self._cache.index
        table, path = index.table, index.table.lookup(prompt.pages, prompt.namespace)
        end = index.pins.of(path, len(prompt.pages))
        return {
            "device": self._tokens(int(np.count_nonzero(table.device.ready[path]))),
            "host": self._tokens(int(np.count_nonzero(table.host.ready[path]))),
            "storage": storage,
            "found": self._tokens(len(index.match(prompt.pages, prompt.namespace).rows)),
            "pinned": 0 if end is None else self._tokens(int(table.depth[end]) + 1),
            "namespace_bytes": index.own_room.used(prompt.namespace),
            "quota_bytes": index.quotas.bounds.get(prompt.namespace),
        }

    def _in_storage(self, prompt: _Prompt) -> Generator[None, None, int | None]:
        """Tokens of a prompt from its beginning on that storage has; None without storage."""
        if (tier := self._cache.storage.tier) is None:
            return None
        asked = tier.ask(prompt.pages, prompt.namespace, read=False)
        while asked is not None and not tier.is_answered(asked):
            yield
        table = self._cache.index.table
        stored = table.stored[table.lookup(prompt.pages, prompt.namespace)] == STORED
        known = int(np.count_nonzero(np.logical_and.accumulate(stored)))
        stops = asked.plan.stops if asked is not None else ()
        return self._tokens(max(known, *stops, 0))

    def _pin(self, prompt: _Prompt) -> Steps:
        index, controller = self._cache.index, self._cache.cache_controller
        if controller is None:
            raise RefusedError(
                "there is no host tier to pin on; start with --enable-hierarchical-cache"
            )
        path, pins = index.match(prompt.pages, prompt.namespace).rows, index.pins
        if len(path) == 0:
            return {"pinned": 0}
        if not pins.fits(path):
            raise RefusedError(
                f"{self._tokens(len(path))} tokens are too many: pins have "
                f"{self._tokens(len(pins.rows))} and may take {PINNED_SHARE}="
                f"{index.pinned_share:g} of the host; unpin something"
            )
        if not pins.is_within_quota(path):
            index.counters.decline(DeclineReason.QUOTA)
            bound = index.quotas.bounds[prompt.namespace]
            raise RefusedError(
                f"{self._tokens(len(path))} tokens are too many: all that is pinned of their "
                f"namespace may take its quota, {bound} bytes; raise it, or unpin something"
            )
        end, plan, tries = int(path[-1]), None, 0
        pins.add(path, len(prompt.pages))
        while not pins.is_whole(end):
            in_flight = isinstance(plan, Transfer) and plan.op in index.pending[TransferKind.BACKUP]
            if not in_flight:
                plan = controller.queue_pinned(end)
                tries += 1
                waits = isinstance(plan, Transfer) or plan == Declined(DeclineReason.BACKLOG)
                if tries > _MOST_TRIES or not waits:
                    pins.remove(end)
                    raise RefusedError("the host has no room for it now, or it could not be copied")
            yield
            if index.pins is not pins or end not in pins.ends:
                raise RefusedError("it was dropped before it was on the host")
            if not pins.is_there(end):
                pins.remove(end)
                raise RefusedError("it left the device before it was on the host; send it again")
        return {"pinned": self._tokens(len(path))}

    def _unpin(self, prompt: _Prompt) -> Steps:
        yield from ()
        pins = self._cache.index.pins
        if prompt.tokens is None:
            tokens = self._tokens(len(pins.rows))
            for end in pins.ends:
                pins.remove(end)
            return {"unpinned": tokens}
        table = self._cache.index.table
        path = table.lookup(prompt.pages, prompt.namespace)
        found = pins.of(path, len(prompt.pages))
        if found is None:
            return {"unpinned": 0}
        pins.remove(found)
        return {"unpinned": self._tokens(int(table.depth[found]) + 1)}

    def _drop(self, prompt: _Prompt) -> Steps:
        yield from ()
        drops = self._cache.index.drops
        if prompt.tokens is None:
            dropped = drops.namespace(prompt.namespace)
        else:
            rest = prompt.tokens[self._tokens(len(prompt.pages)) :]
            dropped = drops.prompt(prompt.pages, prompt.namespace, rest)
        return {"dropped": self._tokens(dropped.pages), "held": self._tokens(dropped.held)}

    def _quota(self, prompt: _Prompt) -> Steps:
        tier, asked = self._cache.index.host_tier, prompt.quota
        if tier is None:
            raise RefusedError(
                "there is no host tier to share; start with --enable-hierarchical-cache"
            )
        if asked is None:
            raise RefusedError("quota: it does not say what to do")
        if asked.action == "list":
            return self._quotas()
        room, namespace = self._cache.index.own_room, prompt.namespace
        if asked.action == "clear":
            cleared = room.clear(namespace)
            return {"cleared": int(cleared), "used": room.used(namespace)}
        if (asked.bytes is None) == (asked.percent is None):
            raise RefusedError("quota: it takes bytes or percent")
        bound = asked.bytes
        if asked.percent is not None:
            bound = int(tier.size * asked.percent / 100)
        assert bound is not None
        room.set(namespace, bound)
        for _ in range(_MOST_STEPS):
            if self._cache.index.own_room.is_settled(namespace):
                break
            yield
        return {"bound": bound, "used": self._cache.index.own_room.used(namespace)}

    def _quotas(self) -> Answer:
        """All quotas, and the namespaces without one that have most of the host."""
        index = self._cache.index
        assert index.host_tier is not None
        bounds, used = index.quotas.bounds, index.own_room.used
        others = {name: used(name) for name in index.table.namespaces.roots if name not in bounds}
        others = {name: count for name, count in others.items() if count}
        most = sorted(others, key=lambda name: -others[name])[:_MOST_OTHERS]
        listed = [_listed(name, used(name), bounds.get(name)) for name in (*bounds, *most)]
        return {
            "host": index.host_tier.size,
            "namespaces": listed,
            "more": len(others) - len(most),
        }

    def _preload(self, prompt: _Prompt) -> Steps:
        if (tier := self._cache.storage.tier) is None:
            raise RefusedError("there is no storage to preload from; attach one")
        asked = tier.ask(prompt.pages, prompt.namespace, read=True)
        while asked is not None and not tier.is_answered(asked):
            yield
        match = self._cache.index.match(prompt.pages, prompt.namespace)
        read = 0 if asked is None or not asked.plan.published else asked.plan.end
        read -= 0 if asked is None or not read else asked.plan.resume
        return {"read": self._tokens(read), "found": self._tokens(len(match.rows))}


def _listed(namespace: Hashable, used: int, bound: int | None) -> Answer:
    assert isinstance(namespace, tuple)
    extra_key, cache_salt = namespace
    return {"extra_key": extra_key, "cache_salt": cache_salt, "used": used, "bound": bound}


def _step(steps: Steps) -> "DumperControlReqOutput | None":
    """Let a call go on; its answer, if it has ended."""
    from sglang.srt.managers.io_struct import DumperControlReqOutput

    try:
        next(steps)
    except StopIteration as end:
        return DumperControlReqOutput(success=True, response=[end.value])
    except RefusedError as refusal:
        return _refused(str(refusal))
    return None


def _refused(why: str) -> "DumperControlReqOutput":
    from sglang.srt.managers.io_struct import DumperControlReqOutput

    return DumperControlReqOutput(success=False, response=[], error=why)
