"""One command for a GPU that is at hand for minutes: ``python -m launch.bench.gpu``."""
