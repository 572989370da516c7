"""Write docs/configuration.md from the code that reads the configuration.

python -m launch.configuration docs/configuration.md
"""

from collections.abc import Callable, Iterator

import msgspec

from sglang_ext.adapter.options import EARLY_REFUSALS, OWN_CACHE, REFUSALS
from sglang_ext.arguments import Parser, output_file
from sglang_ext.config import BACKEND, TOGGLE, VARIABLES, ExtConfig, Variable
from sglang_ext.core.eviction_policy import POLICIES

_INTRODUCTION = f"""\
# Configuration

`python -m launch.configuration docs/configuration.md` writes this page from `sglang_ext/config.py`
and `sglang_ext/adapter/options.py`. Edit those.

Two ways select the cache. `{TOGGLE}=1` does it alone, host tier included.
`--radix-cache-backend {BACKEND}` selects the cache, and `--enable-hierarchical-cache` adds
the host tier. Where the variable is set beside the flag of another cache, the flag wins.

## Environment variables

An empty variable counts as unset. An unknown `SGLANG_EXT_*` variable and a value that is not
allowed end the server at start, with one line.
"""

*_FIRST, _LAST = (f"`{name}`" for name in POLICIES if name != "lru")
_RANKING = f"{', '.join(_FIRST)} and {_LAST}"
_ENGINE = f"""\

## Options of the engine that the cache uses

Every option means what it means in stock. These have something to add here.

| option | here |
|---|---|
| `--hicache-size` | GB of host memory, for both kinds of layers; each rank takes as much |
| `--hicache-ratio` | the same as a multiple of the device pools, if `--hicache-size` is not given |
| `--hicache-mem-layout` | `layer_first` becomes `page_first`: on the host a page is in one place |
| `--hicache-io-backend` | which of the engine's copies run, if the engine copies |
| `--hicache-write-policy` | what is copied to the host at once; all copy ahead of eviction |
| `--radix-eviction-policy` | order of eviction on the device, see the next section. \
{_RANKING} rank pages. Windows leave the device by their last use, as in stock \
0.5.23 (`findings/sglang-window-eviction-policy.sh`), and without a host tier they are lost. Hits \
count with any write policy; in stock none does with `write_back`. `tlru` takes \
`threshold` and `next_prompt_estimate` in `--radix-eviction-policy-config`, as in stock |
| `--schedule-low-priority-values-first` | with eviction by priority, low values stay longest |
| `--page-size` | below 16 the table has pages of 16 tokens, and prefixes are found to the token |
| `--disaggregation-mode` | `prefill`: see [architecture](architecture.md#prefill-servers) |
| `--disable-radix-cache` | the engine's own disabled cache; nothing of ours runs |
| `--enable-metrics` | exports [the cache's metrics](metrics.md) too |
| `--kv-events-config` | also tells of pages in storage, see [operations](operations.md#kv-events) |
| `--hicache-storage-backend` and what belongs to it | the storage tier, see [storage](storage.md) |

[Scheduler options](scheduler-options.md) has every option that changes how requests are batched.

## Options of the engine that are checked

They are checked when the engine has resolved them. Any other value than an allowed one ends the
server at start, with one line that names the option, the value, what is allowed and what to use.
"""

_MODELS = """\

## Models that are refused

Refused by architecture before their weights are read: text-only Llama 4, models with states of
recurrent layers, and those with an index (DSA). Refused when the cache is built: pools with scales
for blocks (FP4, MXFP8, which a checkpoint can ask for too), models that read their whole prompt
while they decode and have a window for the rest, and pages below 16 tokens or drafts with KV for a
model without a pool of windows.
[Architecture](architecture.md) lists the architectures that are served.
"""


def default(variable: Variable) -> str:
    """What counts when a variable is not set."""
    field = next(f for f in msgspec.structs.fields(ExtConfig) if f.name == variable.field)
    if variable.unset:
        return variable.unset
    value = field.default
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{int(value) if isinstance(value, bool) else format(value, 'g')}`"


def kind(variable: Variable) -> str:
    """Type of a variable's field, without the None of one that may be unset."""
    field = next(f for f in msgspec.structs.fields(ExtConfig) if f.name == variable.field)
    name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return name.removesuffix(" | None")


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    first, *others = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return first + "|---" * len(head) + "|\n" + "".join(others)


def page() -> str:
    """The text of docs/configuration.md."""
    variables = table(
        ("variable", "type", "default", "allowed", "meaning"),
        ((f"`{v.name}`", kind(v), default(v), v.allowed, v.meaning) for v in VARIABLES),
    )
    options = table(
        ("option", "allowed", "why no other value", "or use"),
        (
            (
                f"`{refusal.option}`",
                refusal.allowed,
                refusal.why,
                refusal.instead.replace(OWN_CACHE, "SGLang's own cache"),
            )
            for refusal in (*EARLY_REFUSALS, *REFUSALS)
        ),
    )
    return "\n".join((_INTRODUCTION, variables)) + "\n".join((_ENGINE, options)) + _MODELS


def write(page: Callable[[], str], description: str) -> None:
    """Command line of what writes a page."""
    parser = Parser(description=description)
    parser.add_argument("page", type=output_file)
    parser.parse_args().page.write_text(page())


def main() -> None:
    """Command line."""
    write(page, __doc__.splitlines()[0])


if __name__ == "__main__":
    main()
