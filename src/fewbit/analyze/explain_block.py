"""A few numbers as blocks of a format: what they share, what each becomes, and what the largest one costs.

    held_i = (value(q_i) - z) * s      or value(q_i) * s + m, for a format with an offset

    squared error = sum_i (held_i - x_i)^2        SNR = 10 log10(sum_i x_i^2 / squared error)   [dB]

Codes and steps are the library's own (`Format.quantize`, on float64); what they mean is computed in
rationals. A format's block shape rarely tiles a handful of numbers: where it does not, all of them are one
block, and ``resized`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from fewbit.analyze.codes import Point, pattern_of, point_at
from fewbit.analyze.exact import Exact, is_finite
from fewbit.errors import InputError
from fewbit.format import Channel, Format, QTensor, Zero, value_of
from fewbit.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of the steps, counted from the elements outward: its grid and a point for every block."""

    grid: Grid
    points: tuple[Point, ...]
    offset: float | None  # added to every step of this level (double quantization); None without


@dataclass(frozen=True, kw_only=True)
class Element:
    """One number of the block."""

    given: Fraction
    block: int  # index of the step that it shares
    code: int  # bit pattern
    bits: str
    held: Fraction

    @property
    def error(self) -> Fraction:
        """Held minus given."""
        return self.held - self.given


@dataclass(frozen=True, kw_only=True)
class BlockExplanation:
    """Numbers as blocks of ``format``, the shape of which is the one used here."""

    format: Format
    resized: bool  # the block shape did not tile these numbers: they are one block
    levels: tuple[Level, ...]
    steps: tuple[Fraction, ...]  # the step of every block, all levels multiplied
    zeros: tuple[Fraction, ...]  # its zero point or offset; empty without
    elements: tuple[Element, ...]
    squared_error: Fraction
    snr_db: float | None  # None without any error
    outlier: int | None  # index of the largest magnitude; None for a single number
    squared_error_rest: Fraction | None  # of the other numbers, in this block
    without: BlockExplanation | None  # the other numbers as a block of their own


def explain_block(numbers: Sequence[Exact], fmt: Format) -> BlockExplanation:
    """``numbers`` as a row of a tensor in ``fmt``, and once more without the largest of them.

    Raises ``InputError`` for Inf and NaN, for a scalar format without steps, and for a count of numbers that
    is no multiple of the grid's width.
    """
    if fmt.scale is None and fmt.grid.width == 1:
        raise InputError(f"{fmt.grid.name} has no blocks: every number stands alone; explain them one by one")
    bad = [x for x in numbers if not is_finite(x)]
    if bad:
        raise InputError(f"a block of {fmt.grid.name} takes finite numbers, got {bad[0]}; leave it out")
    width = fmt.grid.width
    if not numbers or len(numbers) % width:
        raise InputError(
            f"a code of {fmt.grid.name} stands for {width} numbers, got {len(numbers)}; give a multiple of "
            f"{width}"
        )
    given = [Fraction(x) for x in numbers]
    whole = _explain(given, fmt)
    if len(given) < 2 or width > 1:
        return whole
    worst = max(range(len(given)), key=lambda i: abs(given[i]))
    others = [x for i, x in enumerate(given) if i != worst]
    rest = sum(e.error**2 for i, e in enumerate(whole.elements) if i != worst)
    return replace(whole, outlier=worst, squared_error_rest=rest, without=_explain(others, fmt))


def _explain(given: list[Fraction], fmt: Format) -> BlockExplanation:
    shape = (1, len(given))
    used = _tiling(fmt, shape)
    try:
        x = torch.tensor([[float(v) for v in given]], dtype=torch.float64)
    except OverflowError:
        raise InputError("a block takes numbers within float64, up to 1.8e308; give smaller ones") from None
    q = used.quantize(x)
    steps = [Fraction(1)]
    if q.scale is not None:
        steps = [Fraction(v) for v in value_of(q.scale).double().flatten().tolist()]
    zeros = [] if q.zero is None else [Fraction(v) for v in value_of(q.zero).double().flatten().tolist()]
    zeros = zeros * (len(steps) // len(zeros)) if zeros else []  # Zero.MEAN keeps one for all
    values = _values(q)
    patterns = _patterns(used.grid, q.codes).repeat_interleave(used.grid.width).tolist()
    elements = []
    for x_i, v, pattern, b in zip(given, values, patterns, _block_of(used, q.scale, shape), strict=True):
        bits = point_at(used.grid, pattern).bits if used.grid.width == 1 else f"{pattern:0{used.grid.bits}b}"
        held = _held(used.zero, Fraction(v), steps[b], zeros[b] if zeros else Fraction(0))
        elements.append(Element(given=x_i, block=b, code=pattern, bits=bits, held=held))
    squared = sum((e.error**2 for e in elements), Fraction(0))
    signal = sum((v**2 for v in given), Fraction(0))
    snr = 10 * (_log10(signal) - _log10(squared)) if squared and signal else None
    return BlockExplanation(
        format=used,
        resized=used != fmt,
        levels=tuple(_levels(q.scale, used.scale)),
        steps=tuple(steps),
        zeros=tuple(zeros),
        elements=tuple(elements),
        squared_error=squared,
        snr_db=snr,
        outlier=None,
        squared_error_rest=None,
        without=None,
    )


def _tiling(fmt: Format, shape: tuple[int, ...]) -> Format:
    """The same format with every block shape that does not tile replaced by one block for the whole row."""
    if fmt.scale is None:
        return fmt
    block = fmt.block
    try:
        block.check(shape)
    except InputError:
        block = Channel()
    blocks = block.scale_shape(shape)
    offsets = None if fmt.offsets is None else _tiling(fmt.offsets, blocks)
    return replace(fmt, block=block, scale=_tiling(fmt.scale, blocks), offsets=offsets)


def _held(zero: Zero, v: Fraction, s: Fraction, z: Fraction) -> Fraction:
    return v * s + z if zero in (Zero.OFFSET, Zero.MEAN) else (v - z) * s


def _values(q: QTensor) -> list[float]:
    """What the codes mean at unit scale, one number per element."""
    return q.format.grid.value(q.codes, torch.float64).flatten().tolist()


def _patterns(grid: Grid, codes: Tensor) -> Tensor:
    """Canonical codes as bit patterns, flat."""
    return codes.flatten().to(torch.int64) & (2**grid.bits - 1)


def _block_of(fmt: Format, scale: Tensor | QTensor | None, shape: tuple[int, ...]) -> list[int]:
    """The index of the step of every element."""
    if scale is None:
        return [0] * math.prod(shape)
    count = fmt.block.scale_shape(shape)
    index = torch.arange(math.prod(count)).reshape(count)
    elements = fmt.block.split(torch.zeros(shape)).shape[-1]
    return fmt.block.join(index.unsqueeze(-1).expand(*count, elements), shape).flatten().tolist()


def _levels(scale: Tensor | QTensor | None, fmt: Format | None) -> list[Level]:
    if scale is None:
        return []
    grid = fmt.grid
    if isinstance(scale, QTensor):
        patterns, inner, zero = _patterns(grid, scale.codes), scale.scale, scale.zero
    else:
        points = tuple(point_at(grid, pattern_of(grid, v)) for v in scale.double().flatten().tolist())
        return [Level(grid=grid, points=points, offset=None)]
    points = tuple(point_at(grid, p) for p in patterns.tolist())
    offset = None if zero is None else float(zero.flatten()[0])
    return [Level(grid=grid, points=points, offset=offset), *_levels(inner, fmt.scale)]


def _log10(x: Fraction) -> float:
    """Of any positive rational, however small."""
    return math.log10(x.numerator) - math.log10(x.denominator)
