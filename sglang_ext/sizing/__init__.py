"""Sizing: replay traffic against the cache's own core, without an engine or memory."""
