"""Diffs are applied exactly or not at all."""

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.patches.unified import DiffError, content_hash, parse

OLD = b"".join(b"line %d\n" % n for n in range(40))
NEW = OLD.replace(b"line 3\n", b"third\nand more\n").replace(b"line 30\nline 31\n", b"")
DIFF = b"""What it does

diff --git a/a.py b/a.py
index %s..%s 100644
--- a/a.py
+++ b/a.py
@@ -3,3 +3,4 @@ line 1
 line 2
-line 3
+third
+and more
 line 4
@@ -30,4 +31,2 @@ line 28
 line 29
-line 30
-line 31
 line 32
""" % (content_hash(OLD).encode(), content_hash(NEW).encode())


def test_there_and_back() -> None:
    (diff,) = parse(DIFF)
    assert diff.path == "a.py"
    assert diff.apply(OLD) == NEW
    assert diff.reversed().apply(NEW) == OLD


@given(st.binary(max_size=8), st.integers(0, len(OLD)))
def test_no_other_file_is_changed(noise: bytes, at: int) -> None:
    (diff,) = parse(DIFF)
    other = OLD[:at] + noise + OLD[at + len(noise) :]
    if other == OLD:
        assert diff.apply(other) == NEW
    else:
        with pytest.raises(DiffError, match="not the file"):
            diff.apply(other)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"index ", b"indices ", "full hashes"),
        (b" 100644", b" 120000", "full hashes"),
        (b"+++ b/a.py", b"+++ b/b.py", "is not the file in"),
        (b"a.py b/a.py", b"a.py b/b.py", "not a change of one file"),
        (b"diff --git", b"diff", "no 'diff --git' line"),
        (b" line 32\n", b"", "other lines than it says"),
        (b"+and more\n", b"", "not a line of a hunk"),
        (b"+and more\n", b"*and more\n", "not a line of a hunk"),
        (b" line 4\n", b" line 4\n line 5\n", "not the first line of a hunk"),
        (b" line 32\n", b" line 32\n\\ No newline at end of file\n", "not the first line"),
    ],
)
def test_what_is_not_understood_is_refused(old: bytes, new: bytes, reason: str) -> None:
    assert old in DIFF
    with pytest.raises(DiffError, match=re.escape(reason)):
        parse(DIFF.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b" line 2\n", b" line 1\n"), (b"-3,3 +3,4", b"-4,3 +4,4"), (b"+31,2", b"+30,2")],
)
def test_a_hunk_fits_at_its_line_or_not_at_all(old: bytes, new: bytes) -> None:
    (diff,) = parse(DIFF.replace(old, new))
    with pytest.raises(DiffError, match="does not fit"):
        diff.apply(OLD)


def test_a_result_that_is_not_the_one_named_is_refused() -> None:
    (diff,) = parse(DIFF.replace(b"+third", b"+thirt"))
    with pytest.raises(DiffError, match="does not make the file that it names"):
        diff.apply(OLD)


def test_git_reads_it_in_the_same_way(tmp_path: Path) -> None:
    """Which also says that the hashes are git's."""
    (tmp_path / "a.py").write_bytes(OLD)
    subprocess.run(["git", "apply"], input=DIFF, cwd=tmp_path, check=True)
    assert (tmp_path / "a.py").read_bytes() == NEW
    named = subprocess.run(
        ["git", "hash-object", "a.py"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert named.stdout.strip() == content_hash(NEW)
