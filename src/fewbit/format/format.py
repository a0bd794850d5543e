"""Format: the type of a quantized tensor.

    x ~ (value(q) - z) * s      z NONE (= 0), INTEGER (a code of the grid) or FLOAT (inside the rounding, HQQ)
    x ~ value(q) * s + m        m OFFSET, in value space (KIVI, quanto), or MEAN, one a tensor (bitsandbytes)

with one step ``s`` and one ``z`` or ``m`` per block. A scale is a tensor, so it has a Format: float16, E8M0,
E4M3 over a float32 tensor scale (NVFP4) and 8-bit double quantization (NF4) are one recursive field.

Order of computation (each line uses the result of the one before): interval of the block -> raw step -> step
as it is stored -> zero from the stored step -> codes from stored step and zero. Computing the zero or the
codes from the unrounded step is the usual mistake; it costs up to half a step.

Sources: affine mapping, Jacob et al. 2017, https://arxiv.org/abs/1712.05877; two symmetric divisors and their
consequences are in docs/formats.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.block import Block, Channel, Flat, Group, PerTensor, Tiles
from fewbit.format.fit import MSE, AbsMax, Clusters, OutputMSE, Progressive, Range
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.grid import Grid
from fewbit.grid.integer import Int
from fewbit.grid.learned import Learned, choose, decode

# Scales in one of these are kept as tensors of the dtype; any other grid makes the scale a QTensor.
_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Zero(StrEnum):
    """Which offset a format stores per block."""

    NONE = "none"  # symmetric
    INTEGER = "integer"  # a code of the grid: GPTQ, AWQ, compressed-tensors
    FLOAT = "float"  # a float in the code domain, inside the rounding: HQQ
    OFFSET = "offset"  # a float in the value domain: KIVI, quanto
    MEAN = "mean"  # the mean of the tensor, one float, in the value domain: bitsandbytes' nested steps


class Divisor(StrEnum):
    """How a symmetric interval [-A, A] becomes a step. They agree on every grid whose ends are opposite."""

    EDGE = "edge"  # A / max: both ends exact, the most negative integer code unused
    FULL = "full"  # 2A / (max - min): all codes used, +A saturates (compressed-tensors)


@dataclass(frozen=True, kw_only=True)
class Params:
    """What ``Format.fit`` finds: the step as stored and the zero (or offset), one per block; the tables."""

    scale: Tensor | QTensor | None
    zero: Tensor | None
    table: Tensor | QTensor | None = None

    def to(self, device: torch.device | str) -> Params:
        """The same on another device."""
        parts = (self.scale, self.zero, self.table)
        scale, zero, table = (None if p is None else p.to(device) for p in parts)
        return Params(scale=scale, zero=zero, table=table)


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Whose points are learned: the blocks of a tensor that share a table, and how tables are stored.

    store: a plain FP16, BF16 or FP32, or any format with steps, of the matrix [tables, grid.entries].
    """

    block: Block
    store: Format

    def __post_init__(self):
        if self.store.scale is None and self.store.grid.name not in _NATIVE:
            raise InputError(f"tables cannot be stored as {self.store}; give FP16, or a format with steps")

    def shape(self, grid: Learned, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Tables and numbers in each for a tensor of ``shape``."""
        return math.prod(self.block.scale_shape(shape)), grid.entries

    def keep(self, tables: Tensor) -> Tensor | QTensor:
        """Tables [T, M, K, w] as they are stored."""
        tables, own = tables.flatten(1), self.store
        return tables.to(_NATIVE[own.grid.name]) if own.scale is None else own.quantize(tables)

    def points(self, table: Tensor | QTensor, grid: Learned, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored tables -> [T, M, K, w]."""
        return value_of(table).to(dtype).view(-1, grid.books, 2**grid.entry_bits, grid.width)

    def vectors(self, x: Tensor, width: int) -> Tensor:
        """The vectors of x [..., in] by the table they share, [T, N, w]."""
        tables = math.prod(self.block.scale_shape(x.shape))
        return self.block.split(x).reshape(tables, -1, width)

    def join(self, parts: Tensor, shape: torch.Size | tuple[int, ...], width: int) -> Tensor:
        """Inverse of `vectors` for the codes [T, N] of a tensor of ``shape``: [..., in / w]."""
        own, codes = self._narrow(shape, width)
        return own.join(parts.view(*own.scale_shape(codes), -1), codes)

    def split(self, codes: Tensor, width: int) -> Tensor:
        """Inverse of `join`: codes [..., in / w] by table, [T, N]."""
        own, _ = self._narrow((*codes.shape[:-1], codes.shape[-1] * width), width)
        return own.split(codes).reshape(math.prod(own.scale_shape(codes.shape)), -1)

    def _narrow(self, shape, width: int) -> tuple[Block, tuple[int, ...]]:
        """The block and the shape when ``width`` columns are one."""
        own = self.block.of(shape) if isinstance(self.block, Tiles) else self.block
        side = next((name for name in ("cols", "size") if hasattr(own, name)), None)
        own = replace(own, **{side: getattr(own, side) // width}) if side else own
        return own, (*shape[:-1], shape[-1] // width)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A grid, the blocks that share a step, the rule for their range, the offset, and the steps' own Format.

    ``scale=None`` is a plain number format without any scale (a cast). ``codebook``: whose points the codes
    of a `Learned` grid mean; its ``range`` is `Clusters`, which learns them. Raises ``InputError`` for a
    combination that means nothing.
    """

    grid: Grid
    block: Block = PerTensor()
    range: Range = AbsMax()
    zero: Zero = Zero.NONE
    divisor: Divisor = Divisor.EDGE
    scale: Format | None = None
    codebook: Codebook | None = None

    def __post_init__(self):
        learned = (
            isinstance(self.grid, Learned),
            self.codebook is not None,
            isinstance(self.range, Clusters),
        )
        if any(learned) and not (all(learned) and self.zero is Zero.NONE):
            raise InputError(
                f"learned tables need a Learned grid, a codebook, range=Clusters() and no zero, got "
                f"{self.grid.name}, {self.codebook}, {self.range} and zero {self.zero}"
            )
        if self.scale is None and self.zero is not Zero.NONE:
            raise InputError(
                f"format {self.grid.name} has a zero point but no scale; give scale=FP16 or another"
            )
        if self.zero is Zero.INTEGER and not isinstance(self.grid, Int):
            raise InputError(
                f"an integer zero point needs an integer grid, got {self.grid.name}; use Zero.OFFSET or "
                "Zero.FLOAT"
            )
        if self.range.of_products and not isinstance(self.block, Channel | Group):
            raise InputError(
                f"range {type(self.range).__name__} needs blocks within a row, Group(n) or Channel(), got "
                f"{self.block}; use MSE"
            )
        if self.grid.height > 1 and isinstance(self.range, MSE | OutputMSE):
            raise InputError(
                f"range {type(self.range).__name__} tries steps on one block at a time, and {self.grid.name} "
                f"couples {self.grid.height} rows; use Gaussian()"
            )
        if self.grid.width > 1:
            if self.range.scalar:
                raise InputError(
                    f"range {type(self.range).__name__} asks where points lie on a line, and those of "
                    f"{self.grid.name} are vectors of {self.grid.width}; use Gaussian() or MSE()"
                )
            blocks = (self.block, *([] if self.codebook is None else [self.codebook.block]))
            sides = (getattr(b, "cols", getattr(b, "size", 0)) for b in blocks if not isinstance(b, Tiles))
            if within := next((side for side in sides if side % self.grid.width), 0):
                raise InputError(
                    f"{self.grid.name} codes {self.grid.width} columns at once and blocks of {within} cut "
                    f"some of them in two; use blocks of a multiple of {self.grid.width}"
                )

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
        return self.grid.max if self.divisor is Divisor.EDGE else (self.grid.max - self.grid.min) / 2

    def unit_points(self) -> Tensor:
        """Where the grid's finite points lie on the interval [-1, 1]: distinct, ascending, [k] float64.

        A symmetric interval [-a, a] puts them at ``a * unit_points``, an affine [c - a, c + a] at ``c + a *
        unit_points``. Raises ``InputError`` for vector grids.
        """
        return _unit_points(self.grid, self.symmetric, self.reach)

    def round_trip(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Blocks [N, n] through the grid for a trial interval; nested steps are tried unrounded."""
        raw = self._step(lo, hi)
        stored = raw if self.scale.scale is not None else value_of(self.store(raw, x))
        scale = self._nonzero(stored).to(x.dtype)
        zero = x.new_zeros(()) if self.zero is Zero.MEAN else self._offset(lo, scale)
        zero = None if zero is None else zero.to(scale.dtype).unsqueeze(-1)
        return self.snap(x, scale.unsqueeze(-1), zero)

    # -- from values to parameters

    def check(self, shape: torch.Size | tuple[int, ...], what: str = "tensor") -> None:
        """Raise ``InputError`` where blocks or vectors do not tile ``shape``; ``what`` names the tensor."""
        if not shape and not isinstance(self.block, PerTensor | Flat):
            raise InputError(
                f"{what} is a single number, which {self} cannot cut into blocks; use PerTensor()"
            )
        self.block.check(shape, what)
        width = self.grid.width
        if width > 1 and (not shape or shape[-1] % width):
            raise InputError(
                f"{self.grid.name} codes {width} columns at once, which does not divide the last side of "
                f"{what} of shape {list(shape)}; choose a grid of another width or exclude this layer with a "
                "rule"
            )
        height = self.grid.height
        if height > 1 and (len(shape) < 2 or shape[-2] % height):
            raise InputError(
                f"{self.grid.name} codes tiles of {height} rows, which do not divide the rows of {what} of "
                f"shape {list(shape)}; choose a grid without tiles or exclude this layer with a rule"
            )
        if self.codebook is not None:
            self.codebook.block.check(shape, what)
            own = self.codebook.block
            if isinstance(own, Tiles) and own.of(shape).cols % width:
                raise InputError(
                    f"{self.grid.name} codes {width} columns at once and tables of {what} of shape "
                    f"{list(shape)} would serve {own.of(shape).cols}; choose another width or other tiles"
                )
        if self.scale is not None and self.scale.scale is not None:
            self.scale.check(self.block.scale_shape(shape), f"the steps of {what}")

    def fit(self, x: Tensor, importance: Tensor | None = None, parent: Tensor | None = None) -> Params:
        """Steps and zeros for ``x`` (float, any shape the block tiles).

        importance: [in], the weight of an error in each column (diag of the Gram matrix), or the Gram matrix
        [in, in] itself; used by range rules that want it. parent: when ``x`` are the steps of another
        tensor, that tensor. Raises ``InputError`` for NaN or Inf, and where the block does not tile ``x``.
        """
        if self.scale is None and self.codebook is None:
            return Params(scale=None, zero=None)
        self.check(x.shape)
        # the sum tells at a fifth of the price
        if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InputError(
                f"tensor of shape {list(x.shape)} holds {bad} NaN or Inf values; nothing can be fitted"
            )
        x = x if x.dtype == torch.float64 else x.float()
        if self.codebook is not None:
            return self._learn(x, importance)
        mean = x.mean().to(self.zero_dtype) if self.zero is Zero.MEAN else None
        blocks = self.block.split(parent if self.range.of_parent else x if mean is None else x - mean)
        if importance is not None:
            importance = self._importance(importance.to(x.dtype), x, blocks.shape[-1])
        if blocks.shape[-1]:
            lo, hi = self.range(blocks, self, importance)
        else:  # an empty tensor with one step
            lo = hi = blocks.new_zeros(blocks.shape[:-1])
        scale = self.store(self._step(lo, hi), x)
        zero = mean if self.zero is Zero.MEAN else self._offset(lo, self._nonzero(value_of(scale)), scale)
        return Params(scale=scale, zero=zero)

    def _learn(self, x: Tensor, importance: Tensor | None) -> Params:
        """Steps, then the tables of what the steps leave; importance as for `fit`."""
        scale, w = None, self.grid.width
        unit, cost = x, None
        if importance is not None and self.range.weighted:
            gram = importance.to(x.dtype)
            gram = gram.diag() if gram.ndim == 1 else gram
            own = torch.stack([gram[i : i + w, i : i + w] for i in range(0, len(gram), w)])
            at = torch.arange(len(own), device=x.device).expand(*x.shape[:-1], -1)
            cost = own[self.codebook.split(at, w)]
        if self.scale is not None:
            blocks = self.block.split(x)
            scale = self.store(self._step(*self.range(blocks, self, None)), x)
            step = self._nonzero(value_of(scale)).to(x.dtype).unsqueeze(-1).expand_as(blocks)
            step = self.block.join(step, x.shape)
            unit = x / step
            if cost is not None:
                cost = cost * self.codebook.vectors(step, w)[..., :1, None].square()
        tables = self.range.tables(self.codebook.vectors(unit, w), self.grid, cost)
        return Params(scale=scale, zero=None, table=self.codebook.keep(tables))

    def _importance(self, importance: Tensor, x: Tensor, n: int) -> Tensor:
        """What the range rule reads: a weight for each element, or the products of each block's columns."""
        if not self.range.of_products:
            weights = importance if importance.ndim == 1 else importance.diagonal()
            return self.block.split(weights.expand_as(x))
        gram = importance if importance.ndim == 2 else importance.diag()
        return torch.stack([gram[i : i + n, i : i + n] for i in range(0, x.shape[-1], n)])

    def _step(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Unrounded step for [lo, hi]; 0 for a block that is all zero, or constant with OFFSET."""
        if self.symmetric:
            return torch.maximum(-lo, hi) / self.reach
        if self.zero is Zero.INTEGER:  # only then is z a code, and 0.0 exact
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        step = (hi - lo) / self.reach
        if self.zero is Zero.FLOAT:  # lo / step must stay finite: a constant block is its own step
            step = torch.where(step > 0, step, lo.abs())
        return step

    def store(self, raw: Tensor, x: Tensor) -> Tensor | QTensor:
        """Steps as their own Format stores them, never 0: 1 for a block of zeros, or the least where the grid
        holds no zero.

        raw: [*block.scale_shape(x.shape)] float >= 0; x: the tensor whose steps they are.
        """
        own = self.scale
        dtype = _NATIVE.get(own.grid.name) if own.scale is None else None
        if dtype is not None:
            info = torch.finfo(dtype)
            tile = self.grid.height > 1 or self.codebook is not None  # nothing there need be all zero
            unused = 0.0 if tile or self.grid.snap(raw.new_zeros(self.grid.width)).any() else 1.0
            return torch.where(raw > 0, raw, unused).clamp(info.smallest_normal, info.max).to(dtype)
        if not getattr(own.grid, "zero", True):  # powers of two: upwards, or up to 1.5 max would be clipped
            significand, e = torch.frexp(raw)
            up = torch.ldexp(torch.ones_like(raw), e - (significand == 0.5).int())
            raw = torch.where(raw > 0, up, 0.0)
        params = own.fit(raw, parent=x)
        if own.zero is Zero.NONE:
            unit = torch.ones_like(raw)
            if params.scale is not None:
                outer = value_of(params.scale).to(raw.dtype).unsqueeze(-1)
                unit = own.block.join(outer * torch.ones_like(own.block.split(raw)), raw.shape)
            raw = torch.maximum(raw, own.grid.least * unit)
            if isinstance(own.range, Progressive):
                raw = torch.minimum(raw, own.range.most(self) * unit)
        return own.encode(raw, params)

    @staticmethod
    def _nonzero(scale: Tensor) -> Tensor:
        """Steps safe to divide by: a stored step of exactly 0 (a nested offset can give one) acts as 1."""
        scale = scale.float() if scale.dtype != torch.float64 else scale
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def _offset(self, lo: Tensor, scale: Tensor, stored: Tensor | QTensor | None = None) -> Tensor | None:
        """Zero point or offset of blocks that start at ``lo``, from the step's value and as it is stored."""
        if self.zero is Zero.NONE:
            return None
        if self.zero is Zero.OFFSET:
            return (lo - self.grid.min * scale).to(self.zero_dtype)
        if self.zero is Zero.FLOAT:
            return (self.grid.min - lo / scale).to(self.zero_dtype)
        z = (self.grid.min - lo.clamp(max=0) / scale).round().clamp(self.grid.min, self.grid.max)
        if isinstance(stored, QTensor) and isinstance(stored.format.range, Progressive):
            z = stored.format.range.inside(z, stored.codes, self)
        return z.to(self.grid.code_dtype)

    @property
    def zero_dtype(self) -> torch.dtype:
        """Storage of a float zero or offset: the dtype of the scales, float32 where those are nested or
        coded.
        """
        return (
            torch.float32
            if self.scale.scale is not None
            else _NATIVE.get(self.scale.grid.name, torch.float32)
        )

    @property
    def zero_bits(self) -> int:
        """Stored bits of one zero: a code of the grid, or a float."""
        if self.zero is Zero.NONE:
            return 0
        return self.grid.bits if self.zero is Zero.INTEGER else torch.finfo(self.zero_dtype).bits

    # -- from values to codes and back: the only place where the arithmetic stands

    def code(
        self, x: Tensor, scale: Tensor, zero: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes of ``x`` for steps and zeros that broadcast to it. With a generator: stochastic rounding."""
        return self._round(self._to_unit(x, scale, zero), generator)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Values of ``codes`` for steps and zeros that broadcast to them, in the dtype of ``scale``."""
        return self.from_unit(self.unit_values(codes, scale.dtype), scale, zero)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``decode(code(x))`` without the detour through integers."""
        u = self._to_unit(x, scale, zero)
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
        return self.grid.round(
            u if self.grid.width == 1 else u.unflatten(-1, (-1, self.grid.width)), generator
        )

    def _to_unit(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
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
            scale = self._nonzero(value_of(params.scale)).to(x.dtype).unsqueeze(-1)
            zero = None if params.zero is None else params.zero.to(x.dtype).unsqueeze(-1)
            unit = self.block.join(self._to_unit(self.block.split(x), scale, zero), x.shape)
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
        scale = self.block.take(self._nonzero(value_of(params.scale)), shape, columns)
        if params.zero is None:
            return scale, None
        zero = params.zero.to(scale.dtype)
        return scale, zero.expand_as(scale) if self.zero is Zero.MEAN else self.block.take(
            zero, shape, columns
        )

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
            bits += self.zero_bits * (1 if self.zero is Zero.MEAN else math.prod(blocks))
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
