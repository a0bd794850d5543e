"""Codes as bit patterns: the fields that a code consists of, and the exact number that it means.

The pattern of an integer is two's complement, that of a table the index. (Packed checkpoints store signed
integers as offset binary, see `Grid.to_unsigned`; that is a matter of files.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import torch

from fewbit.analyze.exact import Exact, from_float
from fewbit.grid import Float, Grid, Table


@dataclass(frozen=True, kw_only=True)
class Point:
    """A code of a grid and what it means."""

    code: int  # the bit pattern as an unsigned number
    parts: tuple[tuple[str, str], ...]  # (name, bits) of each field, from the left
    value: Exact

    @property
    def bits(self) -> str:
        """The fields with blanks between them, as "0 10000000 1001..."."""
        return " ".join(bits for _, bits in self.parts)


@functools.lru_cache(maxsize=1024)
def pattern_of(grid: Grid, x: float) -> int:
    """The bit pattern that the grid itself gives to x."""
    return int(grid.to_unsigned(grid.round(torch.tensor(x, dtype=torch.float64))))


@functools.lru_cache(maxsize=64)
def codes_of(grid: Grid) -> dict[int, Exact]:
    """Bit pattern -> value, in the order of the codes."""
    codes = grid.codes()
    values = grid.value(codes, torch.float64).tolist()
    return {int(q) & (2**grid.bits - 1): from_float(v) for q, v in zip(codes.tolist(), values, strict=True)}


@functools.lru_cache(maxsize=64)
def ordered(grid: Grid) -> tuple[list[Fraction], list[int]]:
    """Distinct values ascending, and the first code of each."""
    first: dict[Fraction, int] = {}
    for code, value in codes_of(grid).items():
        first.setdefault(Fraction(value), code)
    values = sorted(first)
    return values, [first[value] for value in values]


def point_at(grid: Grid, code: int) -> Point:
    """The point of a bit pattern."""
    if not isinstance(grid, Float):
        return Point(code=code, parts=_parts(grid, code), value=codes_of(grid)[code])
    value = grid.value(grid.from_unsigned(torch.tensor(code)), torch.float64)
    return Point(code=code, parts=_parts(grid, code), value=from_float(value.item()))


def _parts(grid: Grid, code: int) -> tuple[tuple[str, str], ...]:
    """The fields of a code, from the left."""
    bits = f"{code:0{grid.bits}b}"
    if isinstance(grid, Table):
        return (("index", bits),)
    if not isinstance(grid, Float):
        signed = grid.min < 0
        point = grid.bits - getattr(grid, "fraction", 0)  # fixed point: where the binary point stands
        dotted = f"{bits[:point]}.{bits[point:]}" if 0 < point < grid.bits else bits
        return (("two's complement" if signed else "binary", dotted),)
    widths = (
        ("unused", grid.spare_bits),
        ("sign", int(grid.signed)),
        ("exponent", grid.exponent_bits),
        ("fraction", grid.mantissa_bits),
    )
    parts, start = [], 0
    for name, width in widths:
        if width:
            parts.append((name, bits[start : start + width]))
            start += width
    return tuple(parts)
