"""Transfers between device and host."""
