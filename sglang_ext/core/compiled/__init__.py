"""The hot loops of the core, compiled; the NumPy classes that they stand in for are their
reference, and tests compare the two."""
