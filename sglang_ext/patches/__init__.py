"""A patch set for people who run a fork of SGLang: each patch replaces one of our hooks.

Nothing here runs in a server. The diffs lie in ``patches/`` at the top of the repository, which
``series`` links to; a wheel and an sdist carry them here.
"""
