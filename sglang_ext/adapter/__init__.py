"""The only package that imports sglang (besides the entry points in ``plugin``)."""
