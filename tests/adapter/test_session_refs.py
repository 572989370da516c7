"""Sessions as the engine tells of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_ext.adapter.session_refs import SessionRefs

PATH = np.array([3, 4])


class Calls:
    """Stands for the core's sessions: who left pages behind, and who ended."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def use(self, session: str, path: Any) -> None:
        assert path is PATH
        self.made.append(f"{session} uses")

    def close(self, session: str) -> None:
        self.made.append(f"{session} ends")


def request(refs: SessionRefs, session: str | None) -> Any:
    """One that begins now."""
    number = None if session is None else refs.generation(session)
    return SimpleNamespace(session_id=session, session=None, session_generation=number)


def test_a_request_tells_of_the_session_that_it_began_in() -> None:
    calls = Calls()
    refs = SessionRefs(lambda: calls)  # type: ignore[arg-type,return-value]
    first, second, alone = (request(refs, name) for name in ("a", "a", None))
    refs.ended(first, PATH)
    refs.ended(alone, PATH)
    refs.ended(first, PATH[:0])
    assert calls.made == ["a uses"]
    refs.close("a")
    refs.ended(second, PATH)  # too late
    refs.close("a")
    refs.close(None)
    assert calls.made == ["a uses", "a ends"]
    refs.ended(request(refs, "a"), PATH)
    refs.ended(second, PATH)
    assert calls.made == ["a uses", "a ends", "a uses"]


def test_a_session_that_the_engine_keeps_is_known_by_its_own_name() -> None:
    calls = Calls()
    refs = SessionRefs(lambda: calls)  # type: ignore[arg-type,return-value]
    number = refs.open("b")
    assert refs.generation("b") == number
    kept = SimpleNamespace(session_id="b")
    refs.ended(SimpleNamespace(session_id=None, session=kept, session_generation=number), PATH)
    assert calls.made == ["b uses"]
