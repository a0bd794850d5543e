"""QuEST: weights and inputs on evenly spaced points that fit a normal distribution, after a Hadamard map.

    q = +-1/2, +-3/2, ... +-(2^b - 1)/2 steps,   step = 2 alpha_b rms(x) / (2^b - 1),   per row

Panferov et al. 2025, "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
https://arxiv.org/abs/2502.05003, sections 3.2 and 3.3. alpha_b has the least mean squared error on N(0, 1):
it is the range rule ``Gaussian`` of the format, exact for every grid. The grid holds no zero.

A rule of it is `quest_weight`, `quest_input` and ``Incoherence(output=False)``; train with
``Straight(surrogate=Trust())``, at one bit ``Trust(outer=1.3)``.

Road not taken: Lloyd-Max points. Their error is less by 1 % at 2 bits and 18 % at 4, and no integer product
exists for them.
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, Gaussian, Token
from fewbit.format.activation import Activation
from fewbit.grid import Table, by_name


def midrise(bits: int) -> Table:
    """The 2^bits odd integers about 0, "midrise2" by name. Raises ``InputError`` outside 1 to 8 bits."""
    if bits not in range(1, 9):
        raise InputError(f"QuEST's grid has 1 to 8 bits, got {bits!r}")
    return by_name(f"midrise{bits}")


def quest_weight(bits: int) -> Format:
    """The Format of a weight: a float32 step per output channel."""
    return Format(grid=midrise(bits), block=Channel(), range=Gaussian(), scale=FP32)


def quest_input(bits: int) -> Activation:
    """The same of an input: a step per token, fitted at every call."""
    return Activation(format=Format(grid=midrise(bits), block=Token(), range=Gaussian(), scale=FP32))
