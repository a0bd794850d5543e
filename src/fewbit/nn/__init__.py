"""Modules that run a quantized model: thin shells over ``fewbit.kernel``."""

from fewbit.nn.linear import QLinear

__all__ = ["QLinear"]
