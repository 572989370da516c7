"""Executes transfers: knows devices, streams and threads, and no tree."""
