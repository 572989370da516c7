"""Charts as SVG inside of a page: text, no scripts, and a table of the same numbers behind each.

Colors are classes of the page's style, so one drawing is for light and dark.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Iterator, Sequence

from sglang_ext.tools.report.units import Format, ticks

_WIDTH, _HEIGHT = 640.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 22.0, 12.0, 40.0
_LETTER, _VALUE = 6.9, 80.0
_MOST_BARS = 12
"""Names that are drawn; the table has all."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Numbers with a name.

    Attributes:
        color: class of the page's style, ``c1`` to ``c6``, perhaps with ``soft``.
        values: None where nothing is known.
    """

    name: str
    color: str
    values: Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a direction of a chart is.

    Attributes:
        least: the axis reaches at least so far.
    """

    name: str
    format: Format
    least: float = 0.0


def columns(
    caption: str,
    note: str,
    edges: Sequence[float],
    series: Sequence[Series],
    axes: tuple[Axis, Axis],
    limit: float | None = None,
) -> str:
    """Stacked columns over intervals.

    Args:
        edges: of the intervals, one more than there are columns.
        axes: (of the intervals, of the values).
        limit: a line across, at what the values cannot exceed.
    """
    across, up = axes
    heights = [sum(part.values[n] or 0.0 for part in series) for n in range(len(edges) - 1)]
    frame = _Frame((edges[0], edges[-1]), max([*heights, limit or 0.0, up.least]), axes)
    drawn = [*frame.drawn()]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        below = 0.0
        for part in series:
            value = part.values[number]
            if not value:
                continue
            left, right = frame.x(start), frame.x(end)
            top, bottom = frame.y(below + value), frame.y(below)
            gap = min(1.0, (right - left) * 0.1)
            place = _attributes(x=left, y=top, width=right - left - gap, height=bottom - top)
            said = f"{part.name}: {up.format(value)} ({_interval(start, end, across)})"
            drawn.append(f'<rect class="{part.color}" {place}><title>{_text(said)}</title></rect>')
            below += value
    if limit:
        y = frame.y(limit)
        drawn.append(
            f'<line class="limit" {_attributes(x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)}/>'
        )
    rows = [
        [_interval(start, end, across), *(_said(part.values[n], up.format) for part in series)]
        for n, (start, end) in enumerate(itertools.pairwise(edges))
    ]
    header = [across.name, *(part.name for part in series)]
    body = _legend(series, f"limit: {up.format(limit)}" if limit else "")
    body += _svg(caption, note, _HEIGHT, drawn) + _table(caption, header, rows)
    return _figure(caption, note, body)


def curves(
    caption: str,
    note: str,
    places: Sequence[float],
    series: Sequence[Series],
    axes: tuple[Axis, Axis],
) -> str:
    """Lines over places that are far apart, like the bounds of a histogram: each place is as far
    from the next one."""
    across, up = axes
    numbers = [float(number) for number in range(len(places))]
    most = max([value or 0.0 for part in series for value in part.values] + [up.least])
    named = [across.format(place) for place in places]
    frame = _Frame((numbers[0], numbers[-1]), most, axes, named)
    drawn = [*frame.drawn()]
    for part in series:
        found = [
            (n, value) for n, value in zip(numbers, part.values, strict=True) if value is not None
        ]
        line = " ".join(f"{frame.x(n):.1f},{frame.y(value):.1f}" for n, value in found)
        drawn.append(f'<polyline class="{part.color}" points="{line}"/>')
        for n, value in found:
            said = f"{part.name}: {up.format(value)} at {named[int(n)]}"
            dot = _attributes(cx=frame.x(n), cy=frame.y(value), r=3.5)
            drawn.append(
                f'<circle class="{part.color}" {dot}><title>{_text(said)}</title></circle>'
            )
    rows = [
        [named[n], *(_said(part.values[n], up.format) for part in series)]
        for n in range(len(places))
    ]
    header = [across.name, *(part.name for part in series)]
    body = _legend(series) + _svg(caption, note, _HEIGHT, drawn) + _table(caption, header, rows)
    return _figure(caption, note, body)


def bars(
    caption: str,
    note: str,
    names: Sequence[str],
    series: Sequence[Series],
    axis: Axis,
) -> str:
    """A bar for each name and series, with its number beside it."""
    most = max([value or 0.0 for part in series for value in part.values] + [axis.least]) or 1.0
    shown = names[:_MOST_BARS]
    if len(shown) < len(names):
        note = f"{note} The first {len(shown)} of {len(names)}; the table has all."
    left = max(map(len, shown)) * _LETTER + 14.0
    wide = _WIDTH - left - _VALUE
    row = 18.0 * len(series) + 12.0
    drawn = []
    for number, name in enumerate(shown):
        top = number * row
        at = _attributes(x=left - 10, y=top + row / 2 + 2.5)
        drawn.append(f'<text class="name" {at}>{_text(name)}</text>')
        for place, part in enumerate(series):
            value = part.values[number] or 0.0
            y, length = top + 4 + 18 * place, max(wide * value / most, 1.0 if value else 0.0)
            said = f"{name}, {part.name}: {axis.format(value)}"
            rect = _attributes(x=left, y=y, width=length, height=14, rx=2)
            drawn.append(f'<rect class="{part.color}" {rect}><title>{_text(said)}</title></rect>')
            beside = _attributes(x=left + length + 7, y=y + 11.5)
            drawn.append(f'<text class="value" {beside}>{_text(axis.format(value))}</text>')
    rows = [
        [name, *(_said(part.values[n], axis.format) for part in series)]
        for n, name in enumerate(names)
    ]
    header = [axis.name, *(part.name for part in series)]
    body = _legend(series) if len(series) > 1 else ""
    body += _svg(caption, note, row * len(shown), drawn) + _table(caption, header, rows)
    return _figure(caption, note, body)


class _Frame:
    """The axes of a chart, and where a value is."""

    def __init__(
        self,
        across: tuple[float, float],
        most: float,
        axes: tuple[Axis, Axis],
        places: Sequence[str] = (),
    ) -> None:
        self._begin, self._end = across
        self._axes = axes
        self._places = places
        self._up = ticks(most)

    def x(self, value: float) -> float:
        """From the left."""
        part = (value - self._begin) / ((self._end - self._begin) or 1.0)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """From the top."""
        return _HEIGHT - _BOTTOM - value / self._up[-1] * (_HEIGHT - _TOP - _BOTTOM)

    def drawn(self) -> Iterator[str]:
        """Lines and numbers behind everything else."""
        across, up = self._axes
        for value in self._up:
            y = self.y(value)
            yield f'<line class="grid" {_attributes(x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)}/>'
            at = _attributes(x=_LEFT - 8, y=y + 4)
            yield f'<text class="name" {at}>{_text(up.format(value))}</text>'
        for value, said in self._marks():
            at = _attributes(x=self.x(value), y=_HEIGHT - _BOTTOM + 17)
            yield f'<text class="mark" {at}>{_text(said)}</text>'
        at = _attributes(x=_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, y=_HEIGHT - 4)
        yield f'<text class="mark" {at}>{_text(across.name)}</text>'

    def _marks(self) -> Iterator[tuple[float, str]]:
        if self._places:
            yield from ((float(n), said) for n, said in enumerate(self._places))
            return
        step = ticks(self._end - self._begin, 6)[1]
        for number in range(math.ceil(self._begin / step), math.floor(self._end / step) + 1):
            yield number * step, self._axes[0].format(number * step)


def _interval(start: float, end: float, axis: Axis) -> str:
    return f"{axis.format(start)} to {axis.format(end)}"


def _said(value: float | None, form: Format) -> str:
    return "none" if value is None else form(value)


def _text(said: str) -> str:
    return html.escape(said)


def _attributes(**values: float) -> str:
    return " ".join(f'{name}="{value:.1f}"' for name, value in values.items())


def _svg(caption: str, note: str, height: float, drawn: Sequence[str]) -> str:
    name = f"{caption}. {note}"
    box = f"0 0 {_WIDTH:.0f} {height:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{_text(name)}">{"".join(drawn)}</svg>'


def _legend(series: Sequence[Series], limit: str = "") -> str:
    items = [f'<li><i class="{part.color}"></i>{_text(part.name)}</li>' for part in series]
    if limit:
        items.append(f'<li><i class="limit"></i>{_text(limit)}</li>')
    return f'<ul class="legend" aria-hidden="true">{"".join(items)}</ul>'


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    said = f"<caption>{_text(caption)}</caption>"
    table = f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<details><summary>As a table</summary><div>{table}</div></details>"


def _figure(caption: str, note: str, body: str) -> str:
    return (
        f"<figure><figcaption><h3>{_text(caption)}</h3><p>{_text(note)}</p></figcaption>"
        f"{body}</figure>"
    )
