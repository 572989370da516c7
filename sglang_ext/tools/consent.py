"""Asks before a tool takes away what all users of a server have in its cache."""

import sys

from sglang_ext.arguments import Parser


def add_option(parser: Parser) -> None:
    """``--yes``, for those who need not be asked."""
    parser.add_argument(
        "--yes", action="store_true", help="flush without asking: others lose what they have there"
    )


def require(parser: Parser, url: str, *, agreed: bool) -> None:
    """Go on only if somebody agrees, before a server is asked for anything.

    Args:
        agreed: by ``--yes``.

    Raises:
        SystemExit: nobody does.
    """
    if not agreed and not _may_flush(url):
        parser.error(
            f"nothing was done: this flushes device and host of {url} for all its users; "
            "agree, or use --yes"
        )


def _may_flush(url: str) -> bool:
    """Ask whoever sits at the terminal; nobody there has agreed to nothing."""
    if not sys.stdin.isatty():
        return False
    said = input(f"{url} loses what all its users have on device and host. Continue? [y/N] ")
    return said.strip().lower() in ("y", "yes")
