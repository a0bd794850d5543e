"""Numbers as they were typed, without rounding: text to an exact rational and back.

A finite number is a ``Fraction``. A float stands only for what a rational cannot be: Inf, -Inf, NaN and -0.
Every value of every grid is a rational with a power of two below the line, so its decimal form is finite.

Road not taken: ``float(text)``. Rounding to float64 first and to the format then is rounding twice: a number
just above the middle between two values becomes a tie and may go the wrong way.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction

from fewbit.errors import InputError

Exact = Fraction | float  # a float only for Inf, -Inf, NaN and -0.0

PI = Fraction("3.14159265358979323846264338327950288419716939937510")  # 50 decimals
MOST_CHARACTERS = 400
MOST_EXPONENT = 2000  # of two or ten, before anything is computed
FARTHEST = 10**300  # no format reaches past 2^128; a float64, in which errors are printed, does

_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(?:e([+-]?\d+))?", re.ASCII)
_RATIO = re.compile(r"\d+/\d+", re.ASCII)
_HEX = re.compile(r"0x([0-9a-f]*)\.?([0-9a-f]*)(?:p([+-]?\d+))?", re.ASCII)


def parse(text: str) -> Exact:
    """The number that ``text`` writes: "3.14", "-1e-5", "0x1.8p3", "1/3", "pi", "inf", "nan", "-0".

    Raises ``InputError`` for anything else, and for what is not between 1e-300 and 1e300.
    """
    word = text.strip().lower()
    negative = word.startswith("-")
    found = _magnitude(word[1:] if word[:1] in ("+", "-") else word, text)
    if isinstance(found, Fraction) and found and not 1 <= found * FARTHEST <= FARTHEST**2:
        said = f"{text.strip()} lies beyond 1e+-300, where no format reaches"
        raise InputError(f"{said}; give a number nearer to 1")
    if isinstance(found, float):
        return -found if negative and not math.isnan(found) else found
    return (-found if found else -0.0) if negative else found


def _magnitude(word: str, text: str) -> Exact:
    if len(word) > MOST_CHARACTERS:
        raise InputError(f"a number of {len(word)} characters is too long; give at most {MOST_CHARACTERS}")
    if word in ("inf", "infinity", "nan"):
        return math.inf if word[0] == "i" else math.nan
    if word == "pi":
        return PI
    if _RATIO.fullmatch(word):
        above, below = (int(part) for part in word.split("/"))
        if below == 0:
            raise InputError(f"{text!r} divides by zero; give a number such as 1/3, or inf")
        return Fraction(above, below)
    if found := _DECIMAL.fullmatch(word):
        return Fraction(found[1]) * Fraction(10) ** _exponent(found[2], text)
    found = _HEX.fullmatch(word)
    if found and (found[1] or found[2]):
        digits = Fraction(int(found[1] + found[2], 16), 16 ** len(found[2]))
        return digits * Fraction(2) ** _exponent(found[3], text)
    raise InputError(f"{text!r} is not a number; give one such as 3.14, -1e-5, 0x1.8p3, 1/3, pi, inf or nan")


def _exponent(digits: str | None, text: str) -> int:
    exponent = int(digits or 0)
    if abs(exponent) > MOST_EXPONENT:
        raise InputError(
            f"the exponent of {text!r} is beyond +-{MOST_EXPONENT}; no format reaches past 2^128, so give a "
            "number of a smaller exponent"
        )
    return exponent


def from_float(x: float) -> Exact:
    """A float64 as an exact number: what `parse` would give for it."""
    return x if not math.isfinite(x) or (x == 0 and math.copysign(1, x) < 0) else Fraction(x)


def is_finite(x: Exact) -> bool:
    """False for Inf, -Inf and NaN."""
    return isinstance(x, Fraction) or math.isfinite(x)


def is_negative(x: Exact) -> bool:
    """The sign bit: True for -0 and -Inf too, False for NaN."""
    return x < 0 if isinstance(x, Fraction) else math.copysign(1, x) < 0 and not math.isnan(x)


def floor_log2(a: Fraction) -> int:
    """The exponent e of a positive number: 2^e <= a < 2^(e+1)."""
    e = a.numerator.bit_length() - a.denominator.bit_length()
    return e if a >= Fraction(2) ** e else e - 1


def binary(a: Fraction, places: int) -> str:
    """A non-negative number in binary, cut after ``places`` digits: "11.0010..." (dots where more follow)."""
    scaled = a * 2**places
    digits = f"{math.floor(scaled):0{places + 1}b}"
    whole, part = (digits[:-places], digits[-places:]) if places else (digits, "")
    more = "..." if scaled.denominator != 1 else ""
    part = part if more else part.rstrip("0")
    return f"{whole}.{part}{more}" if part or more else whole


def full(x: Exact) -> str:
    """Every digit: "0.125", "-3.1415927410125732421875", "-0", "inf"; "1/3" where decimals never end."""
    if not isinstance(x, Fraction):
        return "-0" if x == 0 else str(x)
    twos = (x.denominator & -x.denominator).bit_length() - 1
    rest, fives = x.denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{x.numerator}/{x.denominator}"
    places = max(twos, fives)
    digits = str(abs(x.numerator) * 10**places // x.denominator).rjust(places + 1, "0")
    point = f".{digits[-places:]}" if places else ""
    return f"{'-' if x < 0 else ''}{digits[: len(digits) - places]}{point}"


def approximate(x: Exact) -> float:
    """The nearest float64; beyond its range Inf."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def short(x: Exact, width: int = 28) -> str:
    """Every digit if they fit into ``width`` characters, else the first 12 significant ones and dots."""
    text = full(x)
    if len(text) <= width:
        return text
    first = Context(prec=12, rounding=ROUND_DOWN).divide(Decimal(x.numerator), Decimal(x.denominator))
    whole = Fraction(first) == x  # 1e39 has many digits and is told by few
    digits, e, exponent = str(first.normalize() if whole else first).partition("E")
    return f"{digits}{'' if whole else '...'}{e.lower()}{exponent}"
