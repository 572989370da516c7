"""Small models with random weights, for tests, demo and benchmarks."""
