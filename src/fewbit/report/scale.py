"""From values to positions along an axis, and the round values at which it is ticked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis says, whether it is logarithmic, and its ends where they are not those of the data."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From the values of an axis to positions between ``start`` and ``stop``."""

    axis: Axis
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, v = (math.log10(z) if self.axis.log else z for z in (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        return _decades(self.low, self.high) if self.axis.log else _even(self.low, self.high)


def scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> Scale:
    """The scale of an axis that shows ``values``, with some room around them."""
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.log:
        if not 0 < low <= high:
            raise InputError(f"a logarithmic axis from {low:g} to {high:g} is none; give positive ends")
        room = max((high / low) ** 0.04, 1.05)
        low = low / room if axis.low is None else low
        high = high * room if axis.high is None else high
    else:
        room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        low = low - room if axis.low is None else low
        high = high + room if axis.high is None else high
    if not low < high:
        raise InputError(f"an axis from {low:g} to {high:g} has no length; give a low end below the high one")
    return Scale(axis=axis, low=low, high=high, start=start, stop=stop)


def number(value: float) -> str:
    """A figure on an axis or in a tooltip."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3g}".partition("e")[::2]
        return f"{mantissa}e{int(exponent)}" if exponent else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _even(low: float, high: float, wanted: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about ``wanted`` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten; where there are fewer than three, 2 and 5 times them, and else even steps."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    tens = [10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 8)]
    fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    found = [v for v in fine if low <= v <= high]
    return found if len(found) >= 3 else [v for v in _even(low, high) if v > 0]
