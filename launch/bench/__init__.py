"""Benchmarks: hits, pairs of servers under load, tree operations, copies; and their plots."""
