"""Host memory: extents, slots, kept windows, what gives way."""
