"""Write docs/presets.md from the launch lines in launch/presets.

python -m launch.presets_page docs/presets.md
"""

import textwrap

from launch.configuration import table, write
from sglang_ext.planning import preset
from sglang_ext.planning.plan import Plan
from sglang_ext.planning.preset import Preset
from sglang_ext.planning.table import Row

_INTRODUCTION = """\
# Presets

`python -m launch.presets_page docs/presets.md` writes this page from the files in `launch/presets`.
Edit those. Figures are computed from the model's shape, by the same code that plans and that a
server logs at its start.

Each line is one that operators start, with this cache. `sglang-ext plan` prints it and its plan;
options that follow count instead of those of the line:

```
sglang-ext plan --preset gpt-oss-120b
sglang-ext plan --preset gpt-oss-120b --hicache-size 100
```

Tests take every line apart with the engine's own parser and with this cache's refusals. Which of
them have run on what is in [status](status.md). `--hicache-size` is a choice: give what the machine
has, and ask `sglang-ext doctor` with the whole line.

`SGLANG_EXT_SWA_HICACHE=1` can be replaced by
`--radix-cache-backend swa_hicache --enable-hierarchical-cache`. Put `--host`, `--port` and keys
behind a line as you need them ([deployment](deployment.md)).
"""


def _plan(name: str, known: Preset) -> Plan:
    line = known.line()
    device = None if known.device_gb is None else known.device_gb * 1e9
    return Plan.of(name, known.model(line), line, device)


def _figures(rows: list[Row]) -> str:
    return table(("figure", "by the plan"), ((what, said) for what, said in rows))


def _section(name: str) -> str:
    known = preset.load(name)
    parts = ((f"`{part.words}`", part.why) for part in known.part)
    return "\n".join(
        (
            f"\n## {name}\n",
            textwrap.fill(f"From {known.source}. {known.note}", 100) + "\n",
            f"```\n{known.command()}\n```\n",
            table(("part", "why"), parts),
            _figures(_plan(name, known).rows()[:-1]),
        )
    )


def page() -> str:
    """The text of docs/presets.md."""
    return _INTRODUCTION + "".join(_section(name) for name in preset.names())


def main() -> None:
    """Command line."""
    write(page, __doc__.splitlines()[0])


if __name__ == "__main__":
    main()
