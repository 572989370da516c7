"""Which weights this server computes with, as far as anybody can tell."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_ext.adapter import checkpoint

logger = logging.getLogger(__name__)

_BYTES, _WORD = 16, 4
"""Of a digest, and of what ranks agree on as one number."""
_ELSEWHERE = ("remote", "remote_instance", "rdma", "ipc_cache", "private", "jax")
"""Load formats whose weights are not in the files that the model's path names."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and the state of its files when it was loaded."""

    root: Path
    state: checkpoint.Stamp

    @classmethod
    def at(cls, root: Path | None) -> "Source | None":
        """The checkpoint as it is now; None if there is none to be read."""
        try:
            return None if root is None else cls(root, checkpoint.stamp(root))
        except OSError:
            return None

    @property
    def is_untouched(self) -> bool:
        """Whether the files are still those that were loaded."""
        try:
            return checkpoint.stamp(self.root) == self.state
        except OSError:
            return False


class ServedWeights:
    """The weights of one rank. What it says is the same on every rank of a server.

    Weights that no file on this machine has (a remote loader, an update from tensors) get a
    name at random: what is stored of them is found by this server alone, while it runs.

    Attributes:
        configuration: digest of the model's configuration at start; updates leave it.
        architecture: what the model is called.
        is_nobodys: whether ``digest`` was drawn at random.

    Args:
        root: checkpoint that was loaded at start, None if it is not on this machine.
        smallest: element-wise minimum over all ranks; a collective.
        drafts: checkpoints of drafts whose KV is stored as well, None for one that is not on this
            machine. After an update nobody knows what they are.
    """

    def __init__(
        self,
        root: Path | None,
        smallest: Callable[[Sequence[int]], list[int]],
        drafts: Sequence[Path | None] = (),
    ) -> None:
        self._smallest = smallest
        self._source = Source.at(root)
        self._drafts = [Source.at(draft) for draft in drafts]
        self._digest: bytes | None = None
        self.is_nobodys = False
        self.configuration, self.architecture = b"", "model"
        self._tensors: frozenset[str] | None = None
        if self._source is not None:
            self.architecture = checkpoint.architecture(self._source.root)
            try:
                self.configuration = checkpoint.configuration(self._source.root)
                self._tensors = checkpoint.tensor_names(self._source.root)
                for draft in filter(None, self._drafts):
                    self.configuration += checkpoint.configuration(draft.root)
            except OSError:
                self._source = None

    def digest(self) -> bytes:
        """16 bytes that name the weights. A collective, for each set of weights."""
        if self._digest is None:
            own = self._read()
            words = _words(own or bytes(_BYTES))
            agreed = self._smallest([int(own is not None), *words, *(-word for word in words)])
            low, high = agreed[1 : 1 + len(words)], [-word for word in agreed[1 + len(words) :]]
            self.is_nobodys = not agreed[0] or low != high
            if self.is_nobodys:
                # a word of each rank's choice is as good as one of a single rank's
                low = self._smallest(_words(os.urandom(_BYTES)))
            self._digest = b"".join(word.to_bytes(_WORD, "little") for word in low)
        return self._digest

    def _read(self) -> bytes | None:
        problem = "their files are not on this machine"
        found = []
        try:
            for source in (self._source, *self._drafts):
                if source is None:
                    break
                weights = checkpoint.weights(source.root) if source.is_untouched else None
                if weights is None or not source.is_untouched:
                    problem = f"{source.root} is not what was loaded any more, or has no weights"
                    break
                found.append(weights)
            else:
                return found[0] if len(found) == 1 else _digest(found)
        except OSError as error:
            problem = str(error)
        logger.warning(
            "sglang-ext: nobody can tell which weights these are (%s): what is stored of them is "
            "found by this server alone, while it runs",
            problem,
        )
        return None

    def changed(self, source: Source | None) -> None:
        """The weights are others now.

        Args:
            source: what they were loaded from, None if nobody knows. A checkpoint that may have
                left weights as they were is no source, either.
        """
        self._digest = None
        self._source = None
        self._drafts = [None] * len(self._drafts)
        try:
            if source is not None and self._tensors is not None:
                names = checkpoint.tensor_names(source.root)
                if names is not None and names >= self._tensors:
                    self._source = source
        except OSError:
            return


def is_elsewhere(load_format: str, weight_cache: str) -> bool:
    """Whether weights come from somewhere else than the files of the model's path."""
    return load_format in _ELSEWHERE or weight_cache != "off"


def _digest(parts: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=_BYTES).digest()


def _words(digest: bytes) -> list[int]:
    return [int.from_bytes(digest[i : i + _WORD], "little") for i in range(0, _BYTES, _WORD)]
