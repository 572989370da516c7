"""The pure cache core: no torch, no sglang, no clock, no thread, no randomness.

Everything here is a deterministic function of its inputs, so every rank that
makes the same calls holds the same table.
"""
