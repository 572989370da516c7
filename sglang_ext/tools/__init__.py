"""Tools beside the engine: checks of a GPU and of a running server."""
