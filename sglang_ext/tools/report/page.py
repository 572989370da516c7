"""One file that needs nothing else: no script, no font, no address."""

import dataclasses
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark;
  --ground: #f6f7f9; --card: #fff; --text: #16202e; --quiet: #566174; --line: #dfe3ea;
  --c1: #2563eb; --c2: #c2650a; --c3: #0d8a63; --c4: #8a3ffc; --c5: #d02f3e; --c6: #7b879b; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #0f141b; --card: #19202b; --text: #e7ecf3; --quiet: #a3afc0; --line: #313b4a;
  --c1: #6ea8fe; --c2: #f0a54a; --c3: #45c79a; --c4: #be95ff; --c5: #ff8389; --c6: #8d99ad; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 88rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
p { margin: .25rem 0 0; color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.75rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
dl > div, figure, section > table { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
dl > div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .8rem 1rem; }
dd { margin: 0; font-size: 1.55rem; font-weight: 650; font-variant-numeric: tabular-nums; }
dt { color: var(--quiet); font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr));
  gap: 1rem; align-items: start; }
figure { margin: 0; padding: 1rem 1.1rem; min-width: 0; }
figcaption p { font-size: .875rem; }
svg { display: block; width: 100%; height: auto; margin-top: .5rem; }
svg text { fill: var(--text); font: 12.5px system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
.name { text-anchor: end; } .mark { text-anchor: middle; }
svg .name, svg .mark { fill: var(--quiet); }
.grid { stroke: var(--line); }
line.limit { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 4; }
polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0 0; padding: 0;
  list-style: none; font-size: .875rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem;
  border-radius: 3px; vertical-align: -1px; }
.legend i.limit { height: 0; border-radius: 0; border-top: 2px dashed var(--text);
  vertical-align: 4px; }
COLORS
.soft { opacity: .5; }
details { margin-top: .6rem; font-size: .875rem; }
details div { max-height: 20rem; overflow: auto; }
summary { cursor: pointer; color: var(--quiet); }
summary:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; border-radius: 3px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem 0; color: var(--quiet); }
th, td { padding: .3rem .6rem; border-top: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 500; }
section > table caption, section > table th, section > table td { padding: .5rem 1rem; }
footer { margin-top: 2.5rem; color: var(--quiet); font-size: .875rem; }
@media print { body { background: none; } figure { break-inside: avoid; }
  details { display: none; } }
"""
_COLOR = """rect.{c}, circle.{c} {{ fill: var(--{c}); }} polyline.{c} {{ stroke: var(--{c}); }}
i.{c} {{ background: var(--{c}); }}
"""
COLORS = ("c1", "c2", "c3", "c4", "c5", "c6")


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it, as HTML."""

    title: str
    parts: Sequence[str]


def page(
    title: str,
    about: str,
    figures: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str,
) -> str:
    """The file.

    Args:
        figures: (what it is, number) of those that are read first.
    """
    style = _STYLE.replace("COLORS", "".join(_COLOR.format(c=color) for color in COLORS))
    tiles = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in figures
    )
    body = "".join(
        f'<section><h2>{html.escape(section.title)}</h2><div class="charts">'
        f"{''.join(section.parts)}</div></section>"
        for section in sections
        if section.parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p></header>
<main><dl>{tiles}</dl>{body}</main>
<footer>{html.escape(footer)}</footer>
</body>
</html>
"""
