"""Transfers between host and storage."""
