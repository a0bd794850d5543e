"""Fixed point Qm.n: integers that count steps of 2^-n.

    value = q 2^-n,   q an integer of 1 + m + n bits (signed) or m + n bits (unsigned)

Names are Texas Instruments': m integer bits, n fraction bits, the sign not counted. "q1.6" is the element of
MXINT8 (OCP Microscaling Formats v1.0), "q0.15" the sample of a signal processor, "uq0.8" a byte as a
fraction. ARM counts the sign among the integer bits: its Q2.6 is q1.6 here.

The road not taken: `Int` with the power of two moved into the scale. It holds the same numbers, but a format
that prescribes both the step and a power-of-two scale (MXINT8) then needs its scale rule shifted by n.
"""

import math
import re
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid, stochastic_round
from fewbit.grid.integer import Int


@dataclass(frozen=True)
class Fixed(Grid):
    """A fixed-point grid of ``bits`` bits, ``fraction`` of them behind the point. ``Fixed(8, fraction=6)`` is
    q1.6.

    The code is the integer q: int8 or uint8 up to 8 bits, int16 (signed) or int32 (unsigned) up to 16.
    ``narrow`` drops the most negative code. Refuses widths outside 1-16, more fraction bits than there are
    beside the sign, and a narrow grid that is unsigned or has one bit.
    """

    bits: int
    _: KW_ONLY
    fraction: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 16:
            raise InputError(f"fixed point has 1 to 16 bits with its sign, got {self.bits!r}")
        if not isinstance(self.fraction, int) or not 0 <= self.fraction <= self.bits - self.signed:
            raise InputError(
                f"fixed point of {self.bits} bits{' with a sign' * self.signed} has 0 to "
                f"{self.bits - self.signed} fraction bits, got {self.fraction!r}"
            )
        if self.narrow and (not self.signed or self.bits == 1):
            raise InputError(f"only signed fixed point of 2 bits or more can be narrow, not {self.name}")

    @property
    def name(self) -> str:
        whole = self.bits - self.signed - self.fraction
        return f"{'' if self.signed else 'u'}q{whole}.{self.fraction}{'-narrow' if self.narrow else ''}"

    # The code is an integer of the same kinds, so its limits and its list are those of `Int`.
    lowest, highest, _offset, _list = Int.lowest, Int.highest, Int._offset, Int._list

    @property
    def step(self) -> float:
        """The spacing 2^-n."""
        return 2.0**-self.fraction

    @property
    def min(self) -> float:
        return self.lowest * self.step

    @property
    def max(self) -> float:
        return self.highest * self.step

    @property
    def code_dtype(self) -> torch.dtype:
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.int32

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest multiple of the step, ties to the even code, then clamp; see `Grid.round`."""
        x = x.detach()
        q = (x if x.dtype == torch.float64 else x.float()) / self.step
        q = torch.round(q) if generator is None else stochastic_round(q, generator)
        return q.clamp_(self.lowest, self.highest).to(self.code_dtype)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """q 2^-n, by way of float32, which holds every one exactly; see `Grid.value`."""
        return (codes.float() * self.step).to(dtype)

    def to_unsigned(self, codes: Tensor) -> Tensor:
        """Offset binary as for `Int`: q + 2**(bits - 1) for signed grids, q for unsigned."""
        return (codes.to(torch.int32) + self._offset).to(torch.uint8 if self.bits <= 8 else torch.int32)

    def from_unsigned(self, u: Tensor) -> Tensor:
        """The inverse of `to_unsigned`, from any integer dtype."""
        return (u.to(torch.int32) - self._offset).to(self.code_dtype)

    def describe(self) -> Description:
        return self._describe(
            distinct=self.highest - self.lowest + 1,
            decibels=20 * math.log10(max(self.highest, -self.lowest)),
            min_normal=self.step if self.highest else None,
            epsilon=self.step if self.max > 1 else None,
        )


def parse_fixed(name: str) -> Fixed | None:
    """The grid of a name such as "q3.4", "uq0.8" or "q1.6-narrow"; None when the name has another form.

    Raises InputError when it has that form and no such grid exists ("q9.9").
    """
    found = re.fullmatch(r"(u?)q(\d{1,3})\.(\d{1,3})(-narrow)?", name)
    if found is None:
        return None
    signed, fraction = not found[1], int(found[3])
    return Fixed(int(found[2]) + fraction + signed, fraction=fraction, signed=signed, narrow=bool(found[4]))


FIXED = (
    *(Fixed(8, fraction=n) for n in (6, 7, 4)),
    *(Fixed(16, fraction=n) for n in (15, 8)),
    parse_fixed("uq0.8"),
)
