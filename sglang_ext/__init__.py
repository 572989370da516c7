"""A tiered prefix cache for hybrid sliding-window models, as an SGLang extension."""

__version__ = "0.1.0"
