"""What becomes of one number in a number format: the code, the exact value held, the error, and every step.

For a float with E exponent bits, M fraction bits and a bias (IEEE 754-2019, sections 3.4 and 4.3.1,
https://doi.org/10.1109/IEEESTD.2019.8766229) the walk of x is

    |x| = 1.b1 b2 b3 ... x 2^e,   e = floor(log2 |x|)        the only such form
    e' = max(e, emin)                                         below emin the point moves instead: a subnormal
    |x| = (k + r) 2^(e' - M),   k an integer, 0 <= r < 1      k is kept, r is what the cut leaves over
    k + 1 instead of k when r > 1/2, or r = 1/2 and k odd     round to nearest, ties to even

with the exponent field e' + bias (0 for a subnormal). Integers, fixed point and tables list their values, and
the nearest one is found among them. All of it is computed in rationals: nothing is rounded but the number
itself.

Road not taken: asking `Grid.round` for the code. It is the library's answer for tensors and the tests hold
this module to it, but it starts from a float64, and neither a third nor pi is one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from fewbit.analyze.codes import Point, codes_of, ordered, pattern_of, point_at
from fewbit.analyze.exact import Exact, floor_log2, is_finite, is_negative
from fewbit.errors import InputError
from fewbit.grid import Float, Grid, Specials, Table


class Case(StrEnum):
    """What happened to a number, in a word or two."""

    EXACT = "exact"
    ROUNDED = "rounded"
    TIE = "tie"
    SATURATED = "saturated"
    NO_CODE = "no such code"  # a sign, a zero or a NaN that the format has no code for


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The steps from a finite number, not zero, to the fields of a float; the letters are the module's."""

    magnitude: Fraction  # |x|
    exponent: int  # e
    used: int  # e'
    kept: int  # k, hidden 1 included
    rest: Fraction  # r, in units of the last place
    rounded: int  # k or k + 1
    truncated: Point | None  # where cutting would end; None where even that is beyond the format

    @property
    def subnormal(self) -> bool:
        """True when the number lies below the smallest normal one."""
        return self.used > self.exponent


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A number and the code that holds it. ``held`` is None where the grid has no code to give (NaN)."""

    grid: Grid
    given: Exact
    held: Point | None
    below: Point | None  # the next smaller value of the grid, seen from the one held
    above: Point | None
    step: Fraction | None  # a unit in the last place at the value held; None for a table
    case: Case
    cast: Point | None = None  # what a cast without saturation gives, where that differs
    walk: Walk | None = None

    @property
    def error(self) -> Fraction | None:
        """Held minus given; None where one of them is Inf or NaN."""
        if self.held is None or not (is_finite(self.given) and is_finite(self.held.value)):
            return None
        return Fraction(self.held.value) - Fraction(self.given)

    @property
    def relative(self) -> Fraction | None:
        """|error| / |given|; None where the error is, and for zero."""
        given = self.error is not None and Fraction(self.given)
        return abs(self.error / given) if given else None

    @property
    def ulps(self) -> Fraction | None:
        """Error in units in the last place."""
        return None if self.error is None or self.step is None else self.error / self.step


def explain(x: Exact, grid: Grid) -> Explanation:
    """The nearest value of a scalar grid, at unit scale, chosen as `Grid.round` chooses.

    Raises ``InputError`` for a grid whose codes stand for several numbers at once.
    """
    _check_scalar(grid)
    return _in_float(x, grid) if isinstance(grid, Float) else _in_list(x, grid)


def decode(code: int, grid: Grid) -> Explanation:
    """The other way round: the value of a bit pattern, with its neighbours.

    Raises ``InputError`` for a pattern that is no code of the grid.
    """
    _check_scalar(grid)
    bits = grid.bits - (grid.spare_bits if isinstance(grid, Float) else 0)
    if not 0 <= code < 2**bits:
        unused = " (its first bit is always 0)" if bits < grid.bits else ""
        raise InputError(
            f"{grid.name} has {bits} bits{unused}, so its codes go from 0 to {hex(2**bits - 1)}; got "
            f"{hex(code)}"
        )
    if not isinstance(grid, Float) and code not in codes_of(grid):
        raise InputError(f"{hex(code)} is not used by {grid.name}, which has {len(codes_of(grid))} codes")
    point = point_at(grid, code)
    if isinstance(grid, Float):
        return _explained(grid, point.value, code, Case.EXACT)
    return replace(explain(point.value, grid), held=point)  # a table may hold a value twice


def _check_scalar(grid: Grid) -> None:
    if grid.width > 1:
        raise InputError(
            f"a code of {grid.name} stands for {grid.width} numbers at once; give {grid.width} values"
        )


# Floats.


def _in_float(x: Exact, grid: Float) -> Explanation:
    top = pattern_of(grid, grid.max)
    if x != x:
        case = Case.NO_CODE if grid.specials is Specials.NONE else Case.EXACT
        return _explained(grid, x, pattern_of(grid, math.nan), case)
    if (x < 0 and not grid.signed) or (x == 0 and not grid.zero):
        return _explained(grid, x, 0, Case.NO_CODE, cast=_special(grid, x))
    walk, code = None, top + 1
    if is_finite(x) and x != 0:
        walk, code = _walk(Fraction(x), grid)
    elif x == 0:
        code = 0
    cast = _special(grid, x) if code > top else None
    held = _signed(grid, min(code, top), is_negative(x))
    value = point_at(grid, held).value
    if not is_finite(x) or abs(x) > grid.max:
        case = Case.SATURATED
    elif value == x:
        case = Case.EXACT
    else:
        case = Case.TIE if walk is not None and walk.rest == Fraction(1, 2) else Case.ROUNDED
    return _explained(grid, x, held, case, cast, walk)


def _walk(x: Fraction, grid: Float) -> tuple[Walk | None, int]:
    """The steps, and the magnitude code, which may lie beyond that of ``max``."""
    a, emin, M = abs(x), grid.emin, grid.mantissa_bits
    if not grid.zero:
        if a < Fraction(2) ** emin:
            return None, 0
        if emin < -126 and Fraction(2) ** emin < a < Fraction(2) ** -126:
            return None, 1  # the casts of torch and ml_dtypes take the upper of E8M0's two smallest values
    exponent = floor_log2(a)
    used = max(exponent, emin)
    scaled = a / Fraction(2) ** (used - M)
    kept = math.floor(scaled)
    rest = scaled - kept
    rounded = kept + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1))
    base = ((used - emin) << M) - (0 if grid.zero else 2**M)
    fits = base + kept <= pattern_of(grid, grid.max)
    truncated = point_at(grid, _signed(grid, base + kept, x < 0)) if fits else None
    walk = Walk(
        magnitude=a, exponent=exponent, used=used, kept=kept, rest=rest, rounded=rounded, truncated=truncated
    )
    return walk, base + rounded


def _explained(
    grid: Float, x: Exact, code: int, case: Case, cast: Point | None = None, walk: Walk | None = None
) -> Explanation:
    """Adds neighbours and spacing. Finite codes are counted outward from zero: rank -3 is the third below."""
    held = point_at(grid, code)
    top, sign = pattern_of(grid, grid.max), _sign_bit(grid)
    below = above = step = None
    if held.value == held.value:
        rank = -(code & (sign - 1)) if sign and code & sign else code
        lowest = -top if sign else 0
        near = [r if lowest <= r <= top else None for r in (rank - 1, rank + 1)]
        below, above = (None if r is None else point_at(grid, r if r >= 0 else sign | -r) for r in near)
    if is_finite(held.value):
        a = abs(Fraction(held.value))
        step = Fraction(2) ** ((max(floor_log2(a), grid.emin) if a else grid.emin) - grid.mantissa_bits)
    return Explanation(
        grid=grid, given=x, held=held, below=below, above=above, step=step, case=case, cast=cast, walk=walk
    )


def _special(grid: Float, x: Exact) -> Point | None:
    """What a cast without saturation makes of a number that has no place: Inf or NaN; None without either."""
    if grid.specials is Specials.NONE:
        return None
    loose = replace(grid, saturate=False)
    beyond = -math.inf if x < 0 else math.inf
    return point_at(grid, pattern_of(loose, beyond if x else 0.0))


def _signed(grid: Float, magnitude: int, negative: bool) -> int:
    """A magnitude code with its sign bit; FNUZ has no -0."""
    keep = negative and (magnitude or grid.specials is not Specials.FNUZ)
    return magnitude | (_sign_bit(grid) if keep else 0)


def _sign_bit(grid: Float) -> int:
    """The sign bit of a code, 0 for an unsigned format."""
    return 1 << (grid.exponent_bits + grid.mantissa_bits) if grid.signed else 0


# Integers, fixed point and tables: every value is listed.


def _in_list(x: Exact, grid: Grid) -> Explanation:
    step = None if isinstance(grid, Table) else Fraction(1, 2 ** getattr(grid, "fraction", 0))
    if x != x:
        return Explanation(
            grid=grid, given=x, held=None, below=None, above=None, step=step, case=Case.NO_CODE
        )
    values, codes = ordered(grid)
    i = bisect_left(values, x)  # a Fraction compares with -Inf and Inf as it should
    case = Case.ROUNDED
    if i == len(values) or x < values[0]:
        i, case = min(i, len(values) - 1), Case.SATURATED
    elif values[i] == x:
        case = Case.EXACT
    else:
        left, right = x - values[i - 1], values[i] - x
        if left == right:
            case = Case.TIE
            i -= isinstance(grid, Table) or codes[i - 1] % 2 == 0  # a table: the lower; else the even code
        else:
            i -= left < right
    ends = [j if 0 <= j < len(values) else None for j in (i - 1, i + 1)]
    below, above = (None if j is None else point_at(grid, codes[j]) for j in ends)
    return Explanation(
        grid=grid, given=x, held=point_at(grid, codes[i]), below=below, above=above, step=step, case=case
    )
