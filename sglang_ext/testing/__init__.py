"""Public test machinery: simulated pools, a simulated engine, an independent model."""
