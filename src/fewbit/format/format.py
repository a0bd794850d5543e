"""Format: the type of a quantized tensor.

    x ~ (value(q) - z) * s    or    x ~ value(q) * s + m      one step s, one z or m per block (``affine``)

A grid, the blocks of a tensor that share a step, the rule for their range, and how steps, zeros and learned
tables are stored. A scale is a tensor, so it has a Format: float16, E8M0, E4M3 over a float32 tensor scale
(NVFP4) and 8-bit double quantization (NF4) are one recursive field.

Here stand the data, the way from values to codes and back, and the size. Beside it: steps and zeros of an
interval (``affine``), how intervals are found (``params``), learned tables (``codebook``), refusals
(``checks``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import params as parameters
from fewbit.format.affine import NATIVE, Divisor, Zero, nonzero, offset, raw_step, stored_steps
from fewbit.format.block import Block, Channel, Group, PerTensor
from fewbit.format.checks import check_format, check_shape
from fewbit.format.codebook import Codebook
from fewbit.format.fit import AbsMax, Range
from fewbit.format.params import Params
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.grid import Grid
from fewbit.grid.learned import choose, decode


@dataclass(frozen=True, kw_only=True)
class Format:
    """A grid, the blocks that share a step, the rule for their range, the offset, and the steps' own Format.

    ``scale=None`` is a plain number format without any scale (a cast). ``codebook``: whose points the codes
    of a `Learned` grid mean; its ``range`` is `Clusters`, which learns them. ``offsets``: the Format of the
    offsets, none of them positive, where they are coded like the steps (ggml's K-quants). Raises
    ``InputError`` for a combination that means nothing.
    """

    grid: Grid
    block: Block = PerTensor()
    range: Range = AbsMax()
    zero: Zero = Zero.NONE
    divisor: Divisor = Divisor.EDGE
    scale: Format | None = None
    codebook: Codebook | None = None
    offsets: Format | None = None

    def __post_init__(self):
        check_format(self)

    # -- what range rules may ask

    @property
    def symmetric(self) -> bool:
        """True when an interval is [-a, a] about zero (or about the tensor's mean)."""
        return self.zero in (Zero.NONE, Zero.MEAN)

    @property
    def reach(self) -> float:
        """Steps in half the interval of a symmetric format, in the whole interval of an affine one."""
        if not self.symmetric:
            return self.grid.max - self.grid.min
        ends = self.grid.max, -self.grid.min
        return {Divisor.EDGE: ends[0], Divisor.FULL: sum(ends) / 2, Divisor.SIGNED: max(ends)}[self.divisor]

    def unit_points(self) -> Tensor:
        """Where the grid's finite points lie on the interval [-1, 1]: distinct, ascending, [k] float64.

        A symmetric interval [-a, a] puts them at ``a * unit_points``, an affine [c - a, c + a] at ``c + a *
        unit_points``. Raises ``InputError`` for vector grids.
        """
        return _unit_points(self.grid, self.symmetric, self.reach)

    def round_trip(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Blocks [N, n] through the grid for a trial interval; nested steps are tried unrounded."""
        raw = raw_step(self, lo, hi)
        stored = raw if self.scale.scale is not None else value_of(self.store(raw, x))
        scale = nonzero(stored).to(x.dtype)
        zero = x.new_zeros(()) if self.zero is Zero.MEAN else offset(self, lo, scale)
        zero = None if zero is None else zero.to(scale.dtype).unsqueeze(-1)
        return self.snap(x, scale.unsqueeze(-1), zero)

    # -- from values to parameters

    def check(self, shape: torch.Size | tuple[int, ...], what: str = "tensor") -> None:
        """Raise ``InputError`` where blocks or vectors do not tile ``shape``; ``what`` names the tensor."""
        check_shape(self, shape, what)

    def fit(self, x: Tensor, importance: Tensor | None = None, parent: Tensor | None = None) -> Params:
        """Steps, zeros and tables for ``x`` (float, any shape the block tiles); see `params.fit`."""
        return parameters.fit(self, x, importance, parent)

    def store(self, raw: Tensor, x: Tensor) -> Tensor | QTensor:
        """Steps as their own Format stores them, never 0: 1 for a block of zeros, or the least where the grid
        holds no zero.

        raw: [*block.scale_shape(x.shape)] float >= 0; x: the tensor whose steps they are.
        """
        return stored_steps(self, raw, x)

    @property
    def zero_dtype(self) -> torch.dtype:
        """Storage of a float zero or offset: the dtype of the scales, float32 where those are nested or
        coded.
        """
        plain = self.scale.scale is None
        return NATIVE.get(self.scale.grid.name, torch.float32) if plain else torch.float32

    @property
    def zero_bits(self) -> int:
        """Stored bits of one zero: a code of the grid, or a float."""
        if self.zero is Zero.NONE:
            return 0
        return self.grid.bits if self.zero is Zero.INTEGER else torch.finfo(self.zero_dtype).bits

    # -- from values to codes and back: nowhere else does this arithmetic stand

    def code(
        self, x: Tensor, scale: Tensor, zero: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes of ``x`` for steps and zeros that broadcast to it. With a generator: stochastic rounding."""
        return self._round(self.to_unit(x, scale, zero), generator)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Values of ``codes`` for steps and zeros that broadcast to them, in the dtype of ``scale``."""
        return self.from_unit(self.unit_values(codes, scale.dtype), scale, zero)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``decode(code(x))`` without the detour through integers."""
        u = self.to_unit(x, scale, zero)
        if self.grid.width == 1:
            return self.from_unit(self.grid.snap(u), scale, zero)
        return self.from_unit(self.grid.snap(u.unflatten(-1, (-1, self.grid.width))).flatten(-2), scale, zero)

    def unit_values(
        self, codes: Tensor, dtype: torch.dtype = torch.float32, table: Tensor | QTensor | None = None
    ) -> Tensor:
        """Points of the grid that codes [..., n / width] mean, before step and zero: [..., n].

        table: the learned tables, as stored, of a tensor with a codebook.
        """
        if self.codebook is not None:
            own, w = self.codebook, self.grid.width
            values = decode(own.split(codes, w), own.points(table, self.grid, dtype))
            shape = (*codes.shape[:-1], codes.shape[-1] * w)
            return own.block.join(values.view(*own.block.scale_shape(shape), -1), shape)
        values = self.grid.value(codes, dtype)
        return values if self.grid.width == 1 else values.flatten(-2)

    def _round(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        u = u if self.grid.width == 1 else u.unflatten(-1, (-1, self.grid.width))
        return self.grid.round(u, generator)

    def to_unit(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Where ``x`` lies among the points of the grid, for steps and zeros that broadcast to it."""
        if self.zero is Zero.NONE:
            return x / scale
        if self.zero in (Zero.OFFSET, Zero.MEAN):
            return (x - zero) / scale
        return torch.add(x / scale, zero)

    def from_unit(self, v: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Values that points ``v`` of the grid mean under steps and zeros that broadcast to them."""
        if self.zero is Zero.NONE:
            return v * scale
        if self.zero in (Zero.OFFSET, Zero.MEAN):
            return torch.addcmul(zero, v, scale)
        return (v - zero) * scale

    def encode(self, x: Tensor, params: Params, generator: torch.Generator | None = None) -> QTensor:
        """``x`` on the grid with given parameters, rounded to nearest, or stochastically with a generator."""
        self.check(x.shape)
        if self.scale is None:
            unit = x
        else:
            x = x if x.dtype == torch.float64 else x.float()
            scale = nonzero(value_of(params.scale)).to(x.dtype).unsqueeze(-1)
            zero = None if params.zero is None else value_of(params.zero).to(x.dtype).unsqueeze(-1)
            unit = self.block.join(self.to_unit(self.block.split(x), scale, zero), x.shape)
        if self.codebook is None:
            codes = self._round(unit, generator)
        else:
            own, w = self.codebook, self.grid.width
            found = choose(own.vectors(unit, w), own.points(params.table, self.grid, unit.dtype))
            codes = own.join(found, x.shape, w).to(self.grid.code_dtype)
        kept = {"scale": params.scale, "zero": params.zero, "table": params.table}
        return QTensor(codes=codes, **kept, format=self, shape=x.shape)

    def quantize(self, x: Tensor, importance: Tensor | None = None) -> QTensor:
        """``encode(x, fit(x))``."""
        return self.encode(x, self.fit(x, importance))

    def columns(self, params: Params, shape: torch.Size, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero that the given columns of a matrix [out, in] see: [out or 1, len(columns)], float."""
        if params.scale is None:
            return torch.ones(1, len(columns), device=columns.device), None
        scale = self.block.take(nonzero(value_of(params.scale)), shape, columns)
        if params.zero is None:
            return scale, None
        zero = value_of(params.zero).to(scale.dtype)
        if self.zero is Zero.MEAN:
            return scale, zero.expand_as(scale)
        return scale, self.block.take(zero, shape, columns)

    @property
    def rows_independent(self) -> bool:
        """True when rows of a matrix can be quantized apart with the same result: no block or scale spans
        rows.
        """
        own, book = self.scale, self.codebook
        if book is not None:
            kept = book.store.scale is None or book.store.rows_independent
            if own is None or not (kept and isinstance(book.block, Channel)):
                return kept and isinstance(book.block, Channel)
        local = own is not None and own.scale is None and self.zero is not Zero.MEAN
        return local and isinstance(self.block, Channel | Group) and self.grid.height == 1

    # -- size

    def bits_per_weight(self, shape: torch.Size | tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of ``shape``: codes, scales, zeros, to any depth; no data
        needed.
        """
        n = math.prod(shape)
        bits = n // self.grid.width * self.grid.bits
        if self.scale is not None:
            blocks = self.block.scale_shape(shape)
            bits += math.prod(blocks) * self.scale.bits_per_weight(blocks)
            one = self.zero_bits if self.offsets is None else self.offsets.bits_per_weight(blocks)
            bits += one * (1 if self.zero is Zero.MEAN else math.prod(blocks))
        if self.codebook is not None:
            tables = self.codebook.shape(self.grid, shape)
            bits += math.prod(tables) * self.codebook.store.bits_per_weight(tables)
        return bits / n

    def __str__(self) -> str:
        """Short name in the field's terms: 'int4 group 64 asymmetric (fp16 scales)'."""
        tables = ""
        if self.codebook is not None:
            tables = f" ({self.codebook.store} tables per {_say(self.codebook.block)})"
        if self.scale is None:
            return self.grid.name + tables
        kind = {Zero.NONE: "symmetric", Zero.INTEGER: "asymmetric"}.get(self.zero, f"{self.zero} zero")
        return f"{self.grid.name} {_say(self.block)} {kind} ({self.scale} scales){tables}"


def _say(block: Block) -> str:
    sizes = "x".join(str(v) for v in vars(block).values())
    return f"{type(block).__name__.lower()} {sizes}".strip()


@functools.lru_cache(maxsize=256)
def _unit_points(grid: Grid, symmetric: bool, reach: float) -> Tensor:
    if grid.width > 1:
        raise InputError(f"{grid.name} holds vectors of {grid.width}; its points do not lie on a line")
    values = grid.value(grid.codes(), torch.float64)
    points = torch.unique(values[values.isfinite()] + 0.0)
    return points / reach if symmetric else 2 * (points - grid.min) / reach - 1
