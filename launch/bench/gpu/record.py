"""The report of a part while it is made: on disk after every cell, so nothing that was measured is
lost with the part."""

import json
import threading
from pathlib import Path
from typing import Any


class Record:
    """A JSON object in a file.

    Args:
        path: of the file; its folder is there.

    Attributes:
        data: the object.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {"left_out": []}

    def put(self, value: Any, *keys: str) -> None:
        """Set a value at a path of keys, and write the file."""
        with self._lock:
            place = self.data
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = value
            self._write()

    def leave_out(self, what: str) -> None:
        """Note what there was no time for."""
        with self._lock:
            self.data["left_out"].append(what)
            self._write()

    def _write(self) -> None:
        # whoever reads it meanwhile has the former one
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1))
        new.replace(self._path)
