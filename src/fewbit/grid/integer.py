"""Integers of 1 to 8 bits: the uniform grids.

    signed   [-2^(b-1), 2^(b-1) - 1]        two's complement, `int4`
    narrow   [-2^(b-1) + 1, 2^(b-1) - 1]    the sign-magnitude range, symmetric about zero, `int4-narrow`
    unsigned [0, 2^b - 1]                   `uint4`

The canonical code of an integer is the integer, so `value` is a cast and a zero point is plain arithmetic.
Rounding is half to even (`torch.round`); C's `roundf`, used by some file formats, rounds half away from zero.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid, stochastic_round


@dataclass(frozen=True)
class Int(Grid):
    """An integer grid. ``Int(4)`` is two's complement int4, ``Int(4, signed=False)`` uint4.

    ``narrow`` drops the most negative code, which leaves the range symmetric. Refuses widths outside 1-8, a
    narrow grid that is unsigned, and a narrow grid of one bit (nothing but zero would be left).
    """

    bits: int
    _: KW_ONLY
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise InputError(f"an integer grid has 1 to 8 bits, got {self.bits!r}")
        if self.narrow and not self.signed:
            raise InputError(f"uint{self.bits} cannot be narrow: that drops a negative code; use signed=True")
        if self.narrow and self.bits == 1:
            raise InputError("int1 cannot be narrow: only zero would be left; use at least 2 bits")

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'-narrow' if self.narrow else ''}"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def min(self) -> float:
        return float(self.lowest)

    @property
    def max(self) -> float:
        return float(self.highest)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest integer, ties to even, then clamp; see `Grid.round`. Called once per weight column by
        solvers.

        NaN passes through round and clamp and becomes whatever the cast makes of it (0 on x86): exclude it
        first.
        """
        if generator is None:
            return torch.round(x).clamp_(self.lowest, self.highest).to(self.code_dtype)
        if x.dtype != torch.float64:
            x = x.float()  # the fraction of a 16-bit float must be compared with more than 8 random bits
        return stochastic_round(x, generator).clamp_(self.lowest, self.highest).to(self.code_dtype)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The codes themselves as ``dtype``; see `Grid.value`."""
        return codes.to(dtype)

    def snap(self, x: Tensor) -> Tensor:
        """Round and clamp, without the detour through an integer dtype; see `Grid.snap`."""
        return torch.round(x).clamp_(self.lowest, self.highest)

    def to_unsigned(self, codes: Tensor) -> Tensor:
        """uint8 fields: q + 2**(bits - 1) for signed grids, q for unsigned; see `Grid.to_unsigned`."""
        return (codes.to(torch.int16) + self._offset).to(torch.uint8)

    def from_unsigned(self, u: Tensor) -> Tensor:
        """The inverse of `to_unsigned`, from any integer dtype."""
        return (u.to(torch.int16) - self._offset).to(self.code_dtype)

    @property
    def _offset(self) -> int:
        return 2 ** (self.bits - 1) if self.signed else 0

    def _list(self) -> range:
        return range(self.lowest + self._offset, self.highest + self._offset + 1)

    def describe(self) -> Description:
        return self._describe(
            distinct=self.highest - self.lowest + 1,
            decibels=20 * math.log10(max(self.highest, -self.lowest)),
            min_normal=1.0 if self.highest else None,
            epsilon=1.0 if self.highest > 1 else None,
        )
