"""Sessions of the engine, with ``--enable-session-radix-cache``."""

import itertools
from typing import TYPE_CHECKING

from sglang_ext.core.sessions import Sessions
from sglang_ext.core.table.columns import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req


class SessionRefs:
    """Which sessions are open, and what their requests leave behind.

    A session opens with its first request, or by itself, and may open again after its end. A
    request that began before that end tells nothing of the session that is open now.

    Args:
        sessions: of the table that there is now.
    """

    def __init__(self, sessions: "Callable[[], Sessions]") -> None:
        self._sessions = sessions
        self._generations: dict[str, int] = {}
        self._next = itertools.count(1)

    def open(self, session: str) -> int:
        """Open a session, or open it anew; what its requests get as their generation."""
        self._generations[session] = number = next(self._next)
        return number

    def generation(self, session: str) -> int:
        """That of an open session; it is opened if it is not."""
        return self._generations.get(session) or self.open(session)

    def ended(self, req: "Req", path: Rows) -> None:
        """A request has ended, of which the cache has a path."""
        session = req.session_id
        if session is None and req.session is not None:
            session = req.session.session_id
        if session is None or len(path) == 0:
            return
        if self._generations.get(session) == req.session_generation:
            self._sessions().use(session, path)

    def close(self, session: str | None) -> None:
        """A session has ended."""
        if session is not None and self._generations.pop(session, None) is not None:
            self._sessions().close(session)
