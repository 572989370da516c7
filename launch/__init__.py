"""Tools around a server: start it, make a model, load it, compare it."""
