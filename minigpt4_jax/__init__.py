"""MiniGPT-4 in JAX and Flax: a frozen image tower, one trained projection, a frozen language model."""

__version__ = "0.1.0"
