"""What a kit finds on the class it is mixed into."""

import functools
import unittest
from pathlib import Path
from typing import Any

from launch.models.text import ready_made_text
from launch.server import Server
from launch.traffic import tokens
from tests.kits.cells import Cell

IDS = range(300, 30_000)
"""Token ids that are no bytes and no control tokens."""


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ready_made_text())


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of token ids."""
    return [tokens([seed, number], length, IDS) for number in range(count)]


class OnServer(unittest.TestCase):
    """The base of a kit's test case, bound to a running server by ``on``."""

    longMessage = True
    cell: Cell
    base_url: str
    process: Any
    scratch: Path
    model = str(ready_made_text())
    api_key = "EMPTY"
    input_ids = random_prompts(8, 640, seed=1)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return _tokenizer()

    @property
    def client(self) -> Any:
        """An OpenAI client of the server."""
        import openai

        return openai.Client(api_key=self.api_key, base_url=f"{self.base_url}/v1")

    @classmethod
    def on(cls, server: Server, cell: Cell, scratch: Path) -> type["OnServer"]:
        """The same class for one server."""
        bound = {"base_url": server.url, "process": server.process, "cell": cell}
        return type(cls.__name__, (cls,), {**bound, "scratch": scratch})
