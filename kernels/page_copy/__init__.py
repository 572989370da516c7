"""Copies of pages between device and host: a CPU kernel, a GPU kernel, their reference."""
