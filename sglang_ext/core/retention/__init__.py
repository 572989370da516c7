"""Learned retention: which pages are expected back, and so which ones go first."""
