"""Unified diffs as ``git diff --full-index`` writes them, applied exactly.

The ``index`` line names the whole file before and after by git's hash of its contents. A file is
changed only if it has the first hash, and the result must have the second one. So there is no
fuzz, no offset and no guess: a hunk fits at its line or the diff is refused.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

_FILE = re.compile(rb"diff --git a/(?P<path>\S+) b/(?P=path)")
_INDEX = re.compile(rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40}) 100644")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*")


class DiffError(ValueError):
    """A diff is not what this module reads, or does not fit a file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hunk:
    """Lines that replace others, context included.

    Attributes:
        line: number of its first line before the change, from 0.
        new_line: the same after the change.
    """

    line: int
    new_line: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]

    def reversed(self) -> "Hunk":
        """The hunk that undoes it."""
        return Hunk(self.new_line, self.line, self.new, self.old)


@dataclasses.dataclass(frozen=True, slots=True)
class FileDiff:
    """What a diff does to one file.

    Attributes:
        path: of the file, below the folder that the diff is applied in.
        before: hash of the file's contents without the change.
        after: the same with the change.
    """

    path: str
    before: str
    after: str
    hunks: tuple[Hunk, ...]

    def reversed(self) -> "FileDiff":
        """The diff that undoes it."""
        hunks = tuple(hunk.reversed() for hunk in self.hunks)
        return FileDiff(self.path, self.after, self.before, hunks)

    def apply(self, contents: bytes) -> bytes:
        """The file with the change.

        Raises:
            DiffError: the file is another one, or the diff contradicts itself.
        """
        if content_hash(contents) != self.before:
            raise DiffError(f"{self.path} is not the file that the diff was made for")
        lines, result, done = contents.split(b"\n"), list[bytes](), 0
        for hunk in self.hunks:
            result += lines[done : hunk.line]
            done = hunk.line + len(hunk.old)
            if tuple(lines[hunk.line : done]) != hunk.old or len(result) != hunk.new_line:
                raise DiffError(f"{self.path}: the hunk at line {hunk.line + 1} does not fit")
            result += hunk.new
        changed = b"\n".join([*result, *lines[done:]])
        if content_hash(changed) != self.after:
            raise DiffError(f"{self.path}: the diff does not make the file that it names")
        return changed


def content_hash(contents: bytes) -> str:
    """Git's name for a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()


def parse(diff: bytes) -> tuple[FileDiff, ...]:
    """The changes of a diff, which may begin with prose.

    Raises:
        DiffError: a line is none that is known. Files that a diff makes, removes, renames, or
            leaves without a newline at their end are not.
    """
    _, *parts = re.split(rb"^(?=diff --git )", diff, flags=re.MULTILINE)
    if not parts:
        raise DiffError("there is no 'diff --git' line")
    return tuple(_file(part.removesuffix(b"\n").split(b"\n")) for part in parts)


def _file(lines: list[bytes]) -> FileDiff:
    name, index, *rest = lines
    file, hashes = _FILE.fullmatch(name), _INDEX.fullmatch(index)
    if file is None or hashes is None:
        raise DiffError(f"not a change of one file with full hashes: {name!r}, {index!r}")
    path = file["path"]
    if rest[:2] != [b"--- a/" + path, b"+++ b/" + path]:
        raise DiffError(f"{path!r} is not the file in {rest[:2]}")
    before, after = hashes["before"].decode(), hashes["after"].decode()
    return FileDiff(path.decode(), before, after, tuple(_hunks(rest[2:])))


def _hunks(lines: list[bytes]) -> Iterator[Hunk]:
    at = 0
    while at < len(lines):
        header = _HUNK.fullmatch(lines[at])
        if header is None:
            raise DiffError(f"not the first line of a hunk: {lines[at]!r}")
        line, old_count, new_line, new_count = (int(number or 1) for number in header.groups())
        at += 1
        old, new = list[bytes](), list[bytes]()
        while at < len(lines) and (len(old) < old_count or len(new) < new_count):
            kind, text = lines[at][:1], lines[at][1:]
            if kind not in (b" ", b"-", b"+"):
                raise DiffError(f"not a line of a hunk: {lines[at]!r}")
            if kind != b"+":
                old.append(text)
            if kind != b"-":
                new.append(text)
            at += 1
        if (len(old), len(new)) != (old_count, new_count):
            raise DiffError(f"a hunk has other lines than it says: {header[0]!r}")
        yield Hunk(line - 1, new_line - 1, tuple(old), tuple(new))
