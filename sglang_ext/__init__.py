"""A tiered prefix cache for hybrid sliding-window models, as an SGLang extension."""

__version__ = "0.2.0"
