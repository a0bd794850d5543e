"""Every float format as one row of data, and one construction that encodes them all.

A float has a sign, an exponent field f of E bits and a fraction m of M bits:

    f > 0:  (-1)^S 2^(f - bias) (1 + m / 2^M)        f = 0 (subnormal):  (-1)^S 2^(1 - bias) m / 2^M

Formats differ in E, M, bias and in what they spend on special values (`Specials`). Encoding needs no case
distinction between subnormal, normal and carry into the next binade:

    e = max(floor(log2 |x|), 1 - bias),   k = rint(|x| 2^(M - e)),   magnitude code = (e - (1 - bias)) 2^M + k

because a carry out of the fraction is an increment of the exponent field. In float64 every step is exact for
all formats here, and rint's ties to even are the format's. floor(log2) comes from the bit field, never from
log2.

Sources: IEEE 754; FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433 (e4m3fn, e5m2); OCP
Microscaling Formats v1.0 (e3m2, e2m3, e2m1, e8m0); Integer or Floating Point? New Outlooks for Low-Bit
Quantization on LLMs, https://arxiv.org/abs/2305.12356 (the FP4 with and without reserved exponent).

Speed. `round` has one definition (`_encode`) and two short cuts that give the same codes: torch's own cast
where torch has the dtype, after a clamp (casts agree inside the range on every torch; beyond it they do not:
2.11 makes NaN of an e4m3fn overflow, 2.13 saturates), and for the other formats of up to 8 bits a table over
the leading bits of the float32. Measured for e4m3fn on one CPU core, microseconds for 1e3 / 1e5 / 1e6
elements:

    cast 7 / 71 / 650     bit table 28 / 126 / 1430     bucketize over midpoints 17 / 3800 / 39500
    `_encode` 58 / 1030 / 9900                          the same in int32 arithmetic 70 / 450 / 6200
"""

import enum
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Description, Grid, lookup, stochastic_round


class Specials(enum.Enum):
    """What a format's codes are spent on beside numbers."""

    IEEE = "the top exponent is Inf (fraction 0) and NaN"
    FN = "finite, and NaN with all bits of the magnitude set"
    FNUZ = "finite, NaN in the place of -0: unsigned zero"
    NONE = "finite numbers only"


@dataclass(frozen=True, kw_only=True)
class Float(Grid):
    """A float format. The canonical code is its bit pattern, sign first, then exponent, then fraction.

    ``torch_dtype`` names torch's dtype with the same bits, if any: codes may be viewed as it. ``zero=False``
    is a scale format whose exponent field 0 is an ordinary binade (E8M0). ``spare_bits`` are stored but
    always zero (the sign bit of UE4M3).

    ``saturate``: values beyond ``max``, infinities included, become +-max and what lies below ``min`` becomes
    min. With ``dataclasses.replace(grid, saturate=False)`` what rounds past max becomes Inf, or NaN where
    there is no Inf, as in the casts of IEEE 754 and ml_dtypes; infinities stay Inf or become NaN; an unsigned
    format makes NaN of negative numbers, and of zero when it has none.

    NaN stays NaN (one code per sign; a NaN's payload is not kept) and becomes -0 in a format without NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = Specials.NONE
    signed: bool = True
    zero: bool = True
    spare_bits: int = 0
    saturate: bool = True
    torch_dtype: torch.dtype | None = None

    def __post_init__(self):
        E, M = self.exponent_bits, self.mantissa_bits
        if not (1 <= E <= 8 and 0 <= M <= 23):
            raise InputError(f"{self.name}: a float has 1-8 exponent and 0-23 fraction bits, got {E} and {M}")
        if self.specials is Specials.IEEE and M == 0:
            raise InputError(f"{self.name}: IEEE specials need a fraction bit to tell NaN from Inf; use FN")
        if not self.zero and (self.signed or M):
            raise InputError(
                f"{self.name}: a float without zero holds the powers of two; it is unsigned, without fraction"
            )
        if self.specials is Specials.FNUZ and not self.signed:
            raise InputError(f"{self.name}: FNUZ keeps NaN in the place of -0, so it needs a sign; use FN")
        if self.specials is Specials.NONE and not self.saturate:
            raise InputError(f"{self.name} has no code for an overflow and saturates; drop saturate=False")
        if self.bias > 127 or not 0 < self.max < 2.0**128:
            raise InputError(
                f"{self.name} must fit into float32: bias at most 127 and max below 2^128, got {self.bias} "
                f"and {self.max}"
            )

    # What follows from the row.

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits + self.spare_bits

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16 if self.bits <= 16 else torch.int32

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number."""
        return self.zero - self.bias

    @property
    def _sign(self) -> int:
        """The sign bit of a code; 0 for unsigned formats."""
        return 2 ** (self.exponent_bits + self.mantissa_bits) if self.signed else 0

    @property
    def _inf(self) -> int:
        """Magnitude code of the reserved exponent: Inf in IEEE formats."""
        return (2**self.exponent_bits - 1) << self.mantissa_bits

    @property
    def _top(self) -> int:
        """Magnitude code of ``max``."""
        all_ones = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        return {Specials.IEEE: self._inf - 1, Specials.FN: all_ones - 1}.get(self.specials, all_ones)

    @property
    def _nan(self) -> int:
        """Magnitude code of NaN: all ones, as torch's float8 casts write it. -0 where there is no NaN."""
        if self.specials in (Specials.FNUZ, Specials.NONE):
            return self._sign
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1

    @functools.cached_property
    def max(self) -> float:
        return self._magnitude(self._top)

    @functools.cached_property
    def min(self) -> float:
        return -self.max if self.signed else self._magnitude(0)

    @functools.cached_property
    def least(self) -> float:
        """The smallest positive value; see `Grid.least`."""
        return self._magnitude(int(self.zero))

    def _magnitude(self, code: int) -> float:
        field, m = code >> self.mantissa_bits, code & (2**self.mantissa_bits - 1)
        hidden = 2**self.mantissa_bits if field or not self.zero else 0
        return math.ldexp(hidden + m, max(field, int(self.zero)) - self.bias - self.mantissa_bits)

    # The contract.

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest value, ties to the even significand; see `Grid.round`, and the class on overflow."""
        x = x.detach()
        if generator is not None or x.dtype == torch.float64:
            return self._encode(x, generator)
        if self.torch_dtype and self.saturate and (self.zero or not torch.compiler.is_compiling()):  # E8M0
            return x.float().clamp(self.min, self.max).to(self.torch_dtype).view(self.code_dtype)
        if self.bits > 8 or torch.compiler.is_compiling():  # a graph would build the table at every call
            return self._encode(x)
        # Sign, exponent and M + 1 fraction bits, then one bit that says whether anything follows ("sticky"):
        # enough to round to M bits, since a tie is decided by the bit behind the fraction and whether more
        # follows.
        u = x.float().view(torch.int32)
        dropped = 22 - self.mantissa_bits
        below = 2**dropped - 1
        sticky = (u & below).add_(below).bitwise_right_shift_(dropped)
        cell = sticky.add_(u >> dropped, alpha=2).bitwise_and_(2 ** (self.mantissa_bits + 11) - 1)
        return lookup(_cells(self, x.device), cell)

    def value(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of bit patterns, with -0, Inf and NaN; see `Grid.value`."""
        if self.bits <= 8 and not torch.compiler.is_compiling():
            return lookup(_values(self, codes.device, dtype), codes)
        if self.torch_dtype is not None and (self.zero or self.bits > 8):  # no compiler knows E8M0
            return codes.to(self.code_dtype).view(self.torch_dtype).to(dtype)
        return self._decode(codes).to(dtype)

    def _list(self) -> range:
        return range(2 ** (self.bits - self.spare_bits))

    def describe(self) -> Description:
        specials = {
            "-0": self.signed and self.specials is not Specials.FNUZ,
            "inf": self.specials is Specials.IEEE,
            "nan": self.specials is not Specials.NONE,
        }
        return self._describe(
            distinct=2 * self._top + 1 if self.signed else self._top + 1,
            decibels=20 * (math.log10(self.max) - math.log10(self.least)),
            min_normal=2.0**self.emin,
            smallest_subnormal=self.least if self.least < 2.0**self.emin else None,
            epsilon=2.0 ** (max(self.emin, 0) - self.mantissa_bits),
            specials=tuple(name for name, there in specials.items() if there),
        )

    # The definition, in float64.

    def _encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = x.to(torch.float64)
        M, emin = self.mantissa_bits, self.emin
        # Without saturation anything past 2 max must land past the top code but stay a small number.
        a = x.abs().clamp(max=self.max if self.saturate else 4 * self.max)
        if not self.zero:
            a = a.clamp(min=2.0**emin)
            if emin < -126 and generator is None:
                # A quirk of the E8M0 casts of torch and ml_dtypes, kept so that bytes agree: whatever lies
                # between the two smallest values, a subnormal float32, takes the upper one.
                a = torch.where((a > 2.0**emin) & (a < 2.0**-126), 2.0**-126, a)
        e = ((a.view(torch.int64) >> 52) - 1023).clamp(min=emin)
        y = a * _power_of_two(M - e)
        k = torch.round(y) if generator is None else stochastic_round(y, generator)
        code = ((e - emin) << M) + k.to(torch.int64) - (0 if self.zero else 2**M)
        overflow = self._inf if self.specials is Specials.IEEE else self._nan
        code = torch.where(code > self._top, overflow, code)
        code = torch.where(torch.isnan(x), self._nan, code)
        if self.signed:
            negative = torch.signbit(x)
            if self.specials is Specials.FNUZ:
                negative &= code != 0
            code |= negative * self._sign
        else:
            outside = x < 0 if self.zero else x <= 0
            code = torch.where(outside, 0 if self.saturate else self._nan, code)
        return code.to(self.code_dtype)

    def _decode(self, codes: Tensor) -> Tensor:
        u = self.to_unsigned(codes).to(torch.int64)
        M = self.mantissa_bits
        magnitude = u & (2 ** (self.exponent_bits + M) - 1)
        field = magnitude >> M
        hidden = (field > 0).to(torch.int64) << M if self.zero else 2**M
        significand = (magnitude & (2**M - 1)) + hidden
        x = significand.to(torch.float64) * _power_of_two(field.clamp(min=int(self.zero)) - self.bias - M)
        if self.specials is Specials.IEEE:
            x = torch.where(magnitude > self._top, math.inf, x)
            x = torch.where(magnitude > self._inf, math.nan, x)
        if self.specials is Specials.FN:
            x = torch.where(magnitude > self._top, math.nan, x)
        x = torch.where((u & self._sign) != 0, -x, x)
        return torch.where(u == self._nan, math.nan, x) if self.specials is Specials.FNUZ else x


def _power_of_two(e: Tensor) -> Tensor:
    """2**e in float64 from int64 exponents in [-1022, 1023], exact on every device (exp2 need not be)."""
    return ((e + 1023) << 52).view(torch.float64)


@functools.lru_cache(maxsize=256)
def _values(grid: Float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[codes] value of every bit pattern."""
    return grid._decode(grid.codes()).to(dtype).to(device)


@functools.lru_cache(maxsize=256)
def _cells(grid: Float, device: torch.device) -> Tensor:
    """[2**(M + 11)] uint8: the code of a float32 from its leading M + 10 bits and the sticky bit."""
    cell = torch.arange(2 ** (grid.mantissa_bits + 11), device="cpu")
    u = (cell >> 1 << (22 - grid.mantissa_bits)) | (cell & 1)
    return grid._encode(u.to(torch.int32).view(torch.float32)).to(device)


# The rows.

_IEEE, _FN, _FNUZ = Specials.IEEE, Specials.FN, Specials.FNUZ


def _row(name: str, e: int, m: int, bias: int, specials: Specials = Specials.NONE, **rest) -> Float:
    return Float(name=name, exponent_bits=e, mantissa_bits=m, bias=bias, specials=specials, **rest)


FP32 = _row("fp32", 8, 23, 127, _IEEE, torch_dtype=torch.float32)
TF32 = _row("tf32", 8, 10, 127, _IEEE)  # what tensor cores read of a float32; 19 bits, never stored
BF16 = _row("bf16", 8, 7, 127, _IEEE, torch_dtype=torch.bfloat16)
FP16 = _row("fp16", 5, 10, 15, _IEEE, torch_dtype=torch.float16)
E4M3FN = _row("e4m3fn", 4, 3, 7, _FN, torch_dtype=torch.float8_e4m3fn)
E5M2 = _row("e5m2", 5, 2, 15, _IEEE, torch_dtype=torch.float8_e5m2)
E4M3FNUZ = _row("e4m3fnuz", 4, 3, 8, _FNUZ, torch_dtype=torch.float8_e4m3fnuz)  # AMD MI300
E5M2FNUZ = _row("e5m2fnuz", 5, 2, 16, _FNUZ, torch_dtype=torch.float8_e5m2fnuz)
E3M2 = _row("e3m2", 3, 2, 3)
E2M3 = _row("e2m3", 2, 3, 1)
E2M1 = _row("e2m1", 2, 1, 1)  # OCP's FP4; also MoFQ's FP4 with the codes of Inf and NaN given back to 4 and 6
E2M1_IEEE = _row("e2m1-ieee", 2, 1, 1, _IEEE)  # MoFQ's FP4 before: top exponent reserved, largest value 3
E1M2 = _row("e1m2", 1, 2, 0)  # eight even steps: the integers of a sign and three bits, halved
E3M0 = _row("e3m0", 3, 0, 3)  # zero and powers of two
E8M0 = _row("e8m0", 8, 0, 127, _FN, signed=False, zero=False, torch_dtype=torch.float8_e8m0fnu)
UE4M3 = _row("ue4m3", 4, 3, 7, _FN, signed=False, spare_bits=1)  # NVFP4's scale: e4m3fn bytes with sign 0

FLOATS: tuple[Float, ...] = (
    *(FP32, TF32, BF16, FP16, E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ),
    *(E3M2, E2M3, E2M1, E2M1_IEEE, E1M2, E3M0, E8M0, UE4M3),
)
