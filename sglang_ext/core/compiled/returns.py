"""When pages are used again: the history of paths and what it says; see ``retention.returns``."""

from collections import namedtuple
from typing import Any

import numpy as np
from numba.core.types import Array, NamedTuple, boolean, int16, int32, int64, uint64, void

from sglang_ext.core.compiled.bins import BINS, EDGES, bin_of
from sglang_ext.core.compiled.build import compiled
from sglang_ext.core.compiled.marks import bits_of, next_mark
from sglang_ext.core.compiled.memory import prefetch

INTS = Array(int32, 1, "C")
LONGS = Array(int64, 1, "C")
DIGESTS = Array(uint64, 1, "C")
KINDS = Array(int16, 1, "C")
TABLE = Array(int64, 2, "C")

LENGTHS = 12
"""Classes of first turns: bits of their pages."""
TURNS = 6
"""Later ones that have classes, two each: of a turn that adds little to the one before, and of one
that adds much. The last is for all that come after."""
MUCH = 4
"""A turn adds much if more than one page in so many is new."""
SHARES = 4
"""Classes of pages from which paths part: once, from twice, from four times, from eight times."""
ANSWERS = 3
"""Classes of what was computed behind prompts: of the first turn, the second, and all later ones.
Some clients send an answer with the next prompt, and some send it changed, or not at all."""
FIRST_SHARE = LENGTHS + 2 * TURNS
FIRST_ANSWER = FIRST_SHARE + SHARES
CLASSES = FIRST_ANSWER + ANSWERS
ENDS, ENDS_NEAR = 2, 3
"""Where these are counted, see ``counts``."""
NO_USE = -1
WAYS = 8
ONE_BITS = 8
"""A page counts as so many bits: what has become small in the decay is still a number."""
DECAY = 5
"""Bits: each rebuild forgets one part in 32."""
PRIOR = 16 << ONE_BITS
"""A class is taken to be like all others until it has seen about so many pages."""
UNIT = 30
"""Bits of a fraction: shares, and uses per tick."""
_BLUR = 8
"""Steps in which ages are blurred, by about half an octave in all: bins are narrow to tell pages of
different worth apart, and what is counted in a single one is mostly luck."""
_FINE = 10
"""Bits of a fraction of what is counted in a tick, while it is blurred."""

FIELDS = {
    "digest": DIGESTS,  # (entries,) of pages that are marks; sets of WAYS
    "use": LONGS,  # (entries,) last use, NO_USE for none
    "forks": INTS,  # (entries,) how often paths parted below it
    "weight": INTS,  # (entries,) pages that it stands for
    "tick": LONGS,  # (uses,) a ring: when it was
    "kind": KINDS,  # (uses,) class
    "pending": LONGS,  # (uses,) pages whose last use it is
    "turn": INTS,  # (uses,) of the request
    "pages": INTS,  # (uses,) of the request
    # uses so far; the tick up to which exposure is counted; prompts that went on from the end of
    # another one or from near it; those of them from near it
    "counts": LONGS,
    "events": TABLE,  # (classes, BINS) pages that were used again at that age
    "exposure": TABLE,  # (classes, BINS) ticks that pages were of that age and could have been
    "depths": TABLE,  # (classes, 2) pages, and the sum of their depths
}
_Arrays = namedtuple("ReturnsArrays", FIELDS)
ReturnsArrays: Any = _Arrays
RETURNS = NamedTuple(tuple(FIELDS.values()), _Arrays)


@compiled(int64(int64, int64, int64, int64))
def class_of(turn, pages, added, forks):
    """Class of a page, from the turn and the length of the last request that used it, what it has
    added to the one before, and from how often paths have parted below the page."""
    if forks > 0:
        return FIRST_SHARE + min(SHARES, bits_of(forks)) - 1
    if turn > 0:
        return LENGTHS + 2 * (min(TURNS, turn) - 1) + int64(MUCH * added > pages)
    return min(LENGTHS - 1, bits_of(pages))


@compiled(void(RETURNS, int64, int64, int64, int64))
def _expose(returns, kind, start, end, pages):
    """Pages of a class were of the ages in ``[start, end)``."""
    while start < end:
        b = bin_of(start)
        stop = end if b == BINS - 1 else min(end, EDGES[b + 1])
        returns.exposure[kind, b] += (stop - start) * (pages << ONE_BITS)
        start = stop


@compiled(int64(RETURNS, uint64))
def _set_of(returns, digest):
    """First entry of the set where a digest is, if it is anywhere."""
    mixed = (digest ^ (digest >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    sets = np.uint64(returns.digest.size // WAYS)
    return np.int64((mixed >> np.uint64(32)) % sets) * WAYS


@compiled(int64(RETURNS, uint64))
def _find(returns, digest):
    """Entry of a digest whose last use is remembered, or NO_USE."""
    first = _set_of(returns, digest)
    forgotten = returns.counts[0] - returns.tick.size
    for at in range(first, first + WAYS):
        if returns.digest[at] == digest and returns.use[at] >= max(0, forgotten):
            return at
    return NO_USE


@compiled(int64(RETURNS, uint64))
def _enter(returns, digest):
    """An entry for a new digest: that of the oldest use in its set, which is forgotten."""
    first = _set_of(returns, digest)
    at = first
    for other in range(first, first + WAYS):
        if returns.use[other] < returns.use[at]:
            at = other
    use = returns.use[at]
    if use >= max(0, returns.counts[0] - returns.tick.size):
        returns.pending[use % returns.tick.size] -= returns.weight[at]
    returns.digest[at] = digest
    returns.forks[at] = 0
    return at


@compiled(int64(RETURNS, int64, int64, int64, int64))
def _new_use(returns, kind, tick, turn, pages):
    use = returns.counts[0]
    returns.counts[0] = use + 1
    at = use % returns.tick.size
    returns.tick[at] = tick
    returns.kind[at] = kind
    returns.pending[at] = 0
    returns.turn[at] = turn
    returns.pages[at] = pages
    return use


@compiled(int64(int64))
def answer_class(turn):
    """Class of a page behind the prompt of a turn."""
    return FIRST_ANSWER + min(ANSWERS - 1, turn)


@compiled(void(RETURNS, DIGESTS))
def _fetch(returns, digests):
    """What a search for each mark of a path reads is on its way to the cache afterwards: one after
    the other, they would wait for memory."""
    depth = next_mark(-1)
    while depth < digests.size:
        first = _set_of(returns, digests[depth])
        prefetch(returns.digest.ctypes.data + first * 8)
        prefetch(returns.use.ctypes.data + first * 8)
        prefetch(returns.weight.ctypes.data + first * 4)
        depth = next_mark(depth)


@compiled(void(RETURNS, int64, int64, int64))
def _count(returns, use, pages, tick):
    """So many pages that were last used in one use, if there is one, are used again."""
    if use == NO_USE:
        return
    since, kind = returns.tick[use], returns.kind[use]
    returns.pending[use] -= pages
    returns.events[kind, bin_of(tick - since)] += pages << ONE_BITS
    # up to the last rebuild its exposure has been counted
    start = max(since, returns.counts[1]) - since
    _expose(returns, kind, start + 1, tick - since + 1, pages)


@compiled(void(RETURNS, int64, int64, boolean, int64))
def _count_end(returns, others, behind, parted, apart):
    """A prompt goes on from one of ``others`` pages, and parts from it before page ``behind``, if
    it does: near the end is behind the last multiple of ``apart`` in it."""
    stop = (others - 1) // apart * apart
    if not parted or 0 < stop <= behind:
        returns.counts[ENDS] += 1 << ONE_BITS
        returns.counts[ENDS_NEAR] += int64(parted) << ONE_BITS


@compiled(int64(RETURNS, DIGESTS, int64, int64, int64, KINDS))
def observe(returns, digests, prompt, tick, apart, kinds):
    """A request has used a path; its first ``prompt`` pages are what it has asked for. Its turn;
    ``kinds`` gets the classes of its pages."""
    entries = np.full(digests.size, NO_USE, dtype=np.int64)
    known, behind, last_use, before = -1, prompt, NO_USE, -1
    _fetch(returns, digests)
    # marks that were last used together are counted together
    together, pages = NO_USE, int64(0)
    depth = next_mark(-1)
    while depth < digests.size:
        entry = _find(returns, digests[depth])
        entries[depth] = entry
        if entry == NO_USE:
            behind = min(behind, depth)
        else:
            use = returns.use[entry] % returns.tick.size
            if depth < prompt:
                last_use, known, behind = use, depth, prompt
            if use != together:
                _count(returns, together, pages, tick)
                together, pages = use, int64(0)
            pages += returns.weight[entry]
        depth = next_mark(depth)
    _count(returns, together, pages, tick)
    turn, parted = 0, False
    if last_use != NO_USE:
        others = returns.pages[last_use]
        parted = others > behind or (behind == prompt and others >= prompt)
        if not parted:
            turn = returns.turn[last_use] + 1
        elif 2 * (known + 1) >= others:
            turn = returns.turn[last_use]  # edited, and sent again
        _count_end(returns, others, behind, parted, apart)
    added = prompt - known - 1
    last_kind, use, first, depth = -1, NO_USE, 0, next_mark(-1)
    while depth < digests.size:
        if first < prompt <= depth:
            # what is left of the prompt stands for itself
            kinds[first:prompt] = class_of(turn, prompt, added, 0)
            first, before = prompt, prompt - 1
        entry = entries[depth]
        forks = 0
        if entry != NO_USE:
            if parted and depth <= known:
                returns.forks[entry] += 1
            forks = returns.forks[entry]
        if depth < prompt or forks > 0:
            kind = class_of(turn, prompt, added, forks)
        else:
            kind = answer_class(turn)
        if kind != last_kind:
            use = _new_use(returns, kind, tick, turn, prompt)
            last_kind = kind
        if entry == NO_USE:
            entry = _enter(returns, digests[depth])
        returns.use[entry] = use
        returns.weight[entry] = depth - before
        returns.pending[use % returns.tick.size] += depth - before
        returns.depths[kind, 0] += depth - before
        returns.depths[kind, 1] += (depth - before) * depth
        kinds[first : depth + 1] = kind
        before, first, depth = depth, depth + 1, next_mark(depth)
    kinds[first:prompt] = class_of(turn, prompt, added, 0)
    kinds[max(first, prompt) :] = answer_class(turn)
    return turn


@compiled(void(RETURNS, int64))
def advance(returns, tick):
    """Count the exposure of what has not come back up to a tick, and forget a part of all."""
    returns.events[:] -= returns.events >> DECAY
    returns.exposure[:] -= returns.exposure >> DECAY
    returns.depths[:] -= returns.depths >> DECAY
    returns.counts[ENDS:] -= returns.counts[ENDS:] >> DECAY
    last = returns.counts[1]
    uses = returns.tick.size
    for use in range(max(0, returns.counts[0] - uses), returns.counts[0]):
        at = use % uses
        if returns.pending[at] > 0:
            since = returns.tick[at]
            start = max(since, last) - since
            _expose(returns, returns.kind[at], start + 1, tick - since + 1, returns.pending[at])
    returns.counts[1] = tick


@compiled(TABLE(TABLE))
def _blurred(counts):
    """What was counted in bins, if part of it had been in those beside them: a quarter of what is
    counted in a tick goes to either side in each step."""
    out = np.empty_like(counts)
    for kind in range(counts.shape[0]):
        for b in range(BINS):
            out[kind, b] = (counts[kind, b] << _FINE) // (EDGES[b + 1] - EDGES[b])
        for _ in range(_BLUR):
            before = int64(0)
            for b in range(BINS):
                here, after = out[kind, b], out[kind, b + 1] if b + 1 < BINS else int64(0)
                out[kind, b] = (before + 2 * here + after) >> 2
                before = here
        for b in range(BINS):
            out[kind, b] = (out[kind, b] * (EDGES[b + 1] - EDGES[b])) >> _FINE
    return out


@compiled(void(TABLE, TABLE, int64, TABLE))
def chances(events, exposure, prior, out):
    """Chance, in UNITs, that a page of a class and a bin is used before it is older than that."""
    events, exposure = _blurred(events), _blurred(exposure)
    for b in range(BINS):
        width = EDGES[b + 1] - EDGES[b]
        all_events, all_exposure = events[:, b].sum(), exposure[:, b].sum()
        for kind in range(events.shape[0]):
            # the prior is so many pages that have been through the whole bin
            count = events[kind, b]
            base = exposure[kind, b] + prior * width
            count += all_events // max(1, all_exposure // (prior * width))
            upper = count * width
            lower = base + count * (width - 1) // 2
            if lower <= 0:
                out[kind, b] = 0
            elif upper >= lower:
                out[kind, b] = 1 << UNIT
            else:
                while lower >> 30:
                    lower >>= 1
                    upper >>= 1
                out[kind, b] = (upper << UNIT) // lower


@compiled(void(TABLE, TABLE))
def worth(chance, out):
    """Uses per tick, in UNITs, that a page is worth which is kept as long as it pays.

    For each age the largest ratio, over the ages up to which the page could be kept, of the chance
    that it is used by then to the ticks that it stays: Gittins' index.
    """
    one = 1 << UNIT
    for kind in range(chance.shape[0]):
        for start in range(BINS):
            left, stay, best = one, 0, 0
            for b in range(start, BINS):
                width = EDGES[b + 1] - EDGES[b]
                after = left - ((left * chance[kind, b]) >> UNIT)
                stay += ((left + after) >> 1) * width
                left = after
                best = max(best, ((one - left) << UNIT) // max(1, stay))
                if left < 1 << 10:
                    break
            out[kind, start] = best
