"""Launch lines that operators start known models with: the files of ``launch/presets``.

A file says which model it is for, where the line is from, and for each part of it why it is there.
Figures are in none of them: they come from the model's shape when they are asked for.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sglang_ext.planning.launch_line import LaunchLine, parse, take_apart
from sglang_ext.planning.model import COMPRESSED, PRESETS, Shape
from sglang_ext.planning.model_config import element_bytes_of

_FOLDER = Path(__file__).parent / "presets"
_COMMAND = "python -m sglang.launch_server"


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a launch line.

    Attributes:
        words: a variable with its value, or options with theirs, as a shell takes them.
        why: they are there.
    """

    words: str
    why: str


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A launch line.

    Attributes:
        shape: name of the model's shape in ``model.PRESETS`` or ``model.COMPRESSED``.
        source: who starts this line.
        part: its parts, variables first.
        note: what to know before it is started.
        device_gb: KV memory of a device that figures assume, where the host is a multiple of it.
    """

    shape: str
    source: str
    part: tuple[Part, ...]
    note: str = ""
    device_gb: float | None = None

    def words(self) -> list[str]:
        """Variables and options, a word each."""
        return [word for part in self.part for word in part.words.split()]

    def command(self, more: Sequence[str] = ()) -> str:
        """What to type: a line for each part.

        Args:
            more: options that come last, and so count.
        """
        texts = [part.words for part in self.part]
        variables = [text for text in texts if not text.startswith("--")]
        options = texts[len(variables) :]
        if more:
            options.append(" ".join(more))
        first = " ".join([*variables[-1:], _COMMAND])
        return " \\\n".join([*variables[:-1], first, *(f"    {text}" for text in options)])

    def line(self, more: Sequence[str] = ()) -> LaunchLine:
        """What the options say."""
        _, options = take_apart(self.words())
        return parse([*options, *more], "sglang-ext plan")

    def model(self, line: LaunchLine) -> Shape:
        """The model's shape, with the elements of KV that a line asks for, if all are alike."""
        if (compressed := COMPRESSED.get(self.shape)) is not None:
            return compressed
        whole = PRESETS[self.shape]
        size = element_bytes_of(line.kv_cache_dtype) or whole.dtype_bytes
        return dataclasses.replace(whole, dtype_bytes=size)


def names() -> list[str]:
    """Of all presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str) -> Preset:
    """A preset by its name."""
    return msgspec.convert(tomllib.loads((_FOLDER / f"{name}.toml").read_text()), Preset)
