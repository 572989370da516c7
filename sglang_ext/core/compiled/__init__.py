"""The hot loops of the core, compiled; and the constants that are compiled in."""
