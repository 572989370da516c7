"""``sglang-ext report``: a page about what a server's cache does."""
