"""Format: the type of a quantized tensor.

    x ~ (value(q) - z) * s            z NONE (= 0), INTEGER (a code of the grid) or FLOAT (inside the
    rounding, HQQ) x ~ value(q) * s + m              OFFSET, in value space (KIVI, quanto)

with one step ``s`` and one ``z`` or ``m`` per block. A scale is a tensor, so it has a Format: float16, E8M0,
E4M3 over a float32 tensor scale (NVFP4) and 8-bit double quantization (NF4) are one recursive field.

Order of computation (each line uses the result of the one before): interval of the block -> raw step -> step
as it is stored -> zero from the stored step -> codes from stored step and zero. Computing the zero or the
codes from the unrounded step is the usual mistake; it costs up to half a step.

Sources: affine mapping, Jacob et al. 2017, https://arxiv.org/abs/1712.05877; two symmetric divisors and their
consequences are in docs/formats.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.block import Block, Channel, Group, PerTensor
from fewbit.format.fit import AbsMax, Range
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.grid import Grid
from fewbit.grid.integer import Int

# Scales in one of these are kept as tensors of the dtype; any other grid makes the scale a QTensor.
_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Zero(StrEnum):
    """Which offset a format stores per block."""

    NONE = "none"  # symmetric
    INTEGER = "integer"  # a code of the grid: GPTQ, AWQ, compressed-tensors
    FLOAT = "float"  # a float in the code domain, inside the rounding: HQQ
    OFFSET = "offset"  # a float in the value domain: KIVI, quanto


class Divisor(StrEnum):
    """How a symmetric interval [-A, A] becomes a step. They agree on every grid whose ends are opposite."""

    EDGE = "edge"  # A / max: both ends exact, the most negative integer code unused
    FULL = "full"  # 2A / (max - min): all codes used, +A saturates (compressed-tensors)


@dataclass(frozen=True, kw_only=True)
class Params:
    """What ``Format.fit`` finds: the step as stored and the zero (or offset), one per block."""

    scale: Tensor | QTensor | None
    zero: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A grid, the blocks that share a step, the rule for their range, the offset, and the steps' own Format.

    ``scale=None`` is a plain number format without any scale (a cast). Raises ``InputError`` for a
    combination that means nothing.
    """

    grid: Grid
    block: Block = PerTensor()
    range: Range = AbsMax()
    zero: Zero = Zero.NONE
    divisor: Divisor = Divisor.EDGE
    scale: Format | None = None

    def __post_init__(self):
        if self.scale is None and self.zero is not Zero.NONE:
            raise InputError(
                f"format {self.grid.name} has a zero point but no scale; give scale=FP16 or another"
            )
        if self.zero is Zero.INTEGER and not isinstance(self.grid, Int):
            raise InputError(
                f"an integer zero point needs an integer grid, got {self.grid.name}; use Zero.OFFSET or "
                "Zero.FLOAT"
            )

    # -- from values to parameters
    # ------------------------------------------------------------------------------

    def fit(self, x: Tensor, importance: Tensor | None = None) -> Params:
        """Steps and zeros for ``x`` (float, any shape the block tiles).

        importance: [in], the weight of an error in each column (diag of the Gram matrix), used by range rules
        that want it. Raises ``InputError`` for NaN or Inf, and where the block does not tile ``x``.
        """
        if self.scale is None:
            return Params(scale=None, zero=None)
        self.block.check(x.shape)
        # the sum tells at a fifth of the price
        if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise InputError(
                f"tensor of shape {list(x.shape)} holds {bad} NaN or Inf values; nothing can be fitted"
            )
        blocks = self.block.split(x)
        if importance is not None:
            importance = self.block.split(importance.to(x.dtype).expand_as(x))
        lo, hi = self.range(blocks, self._round_trip, importance)
        raw = self._step(lo, hi)
        scale = self._store(raw)
        return Params(scale=scale, zero=self._offset(lo, self._nonzero(value_of(scale))))

    def _step(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Unrounded step for the interval [lo, hi]; 1 for a block that is all zero (or constant, with an
        offset).
        """
        if self.zero is Zero.NONE:
            a = torch.maximum(-lo, hi)
            reach = self.grid.max if self.divisor is Divisor.EDGE else (self.grid.max - self.grid.min) / 2
            step = a / reach
        else:
            if self.zero is Zero.INTEGER:  # only then is z a code, and 0.0 exact
                lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            step = (hi - lo) / (self.grid.max - self.grid.min)
        return torch.where(step > 0, step, torch.ones_like(step))

    def _store(self, raw: Tensor) -> Tensor | QTensor:
        """The step as its own Format stores it; a step that would vanish becomes the smallest positive
        one.
        """
        own = self.scale
        if own.scale is not None:
            return own.quantize(raw)
        dtype = _NATIVE.get(own.grid.name)
        if dtype is not None:
            info = torch.finfo(dtype)
            return raw.clamp(info.smallest_normal, info.max).to(dtype)
        return QTensor(codes=own.grid.round(raw), scale=None, zero=None, format=own, shape=raw.shape)

    @staticmethod
    def _nonzero(scale: Tensor) -> Tensor:
        """Steps safe to divide by: a stored step of exactly 0 (a tiny block under a nested scale) acts as
        1.
        """
        scale = scale.float() if scale.dtype != torch.float64 else scale
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def _offset(self, lo: Tensor, scale: Tensor) -> Tensor | None:
        """Zero point or offset of blocks that start at ``lo``, from the step as stored."""
        if self.zero is Zero.NONE:
            return None
        if self.zero is Zero.OFFSET:
            return (lo - self.grid.min * scale).to(self.zero_dtype)
        if self.zero is Zero.FLOAT:
            return (self.grid.min - lo / scale).to(self.zero_dtype)
        z = self.grid.min - lo.clamp(max=0) / scale
        return z.round().clamp(self.grid.min, self.grid.max).to(self.grid.code_dtype)

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

    def _round_trip(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Blocks [N, n] through the grid for a trial interval; nested steps are tried unrounded."""
        raw = self._step(lo, hi)
        scale = self._nonzero(raw if self.scale.scale is not None else value_of(self._store(raw)))
        zero = self._offset(lo, scale)
        zero = None if zero is None else zero.to(scale.dtype).unsqueeze(-1)
        return self.snap(x, scale.unsqueeze(-1), zero)

    # -- from values to codes and back: the only place where the arithmetic stands
    # -------------------------------

    def code(
        self, x: Tensor, scale: Tensor, zero: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes of ``x`` for steps and zeros that broadcast to it. With a generator: stochastic rounding."""
        return self.grid.round(self._to_unit(x, scale, zero), generator)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Values of ``codes`` for steps and zeros that broadcast to them, in the dtype of ``scale``."""
        return self._from_unit(self.grid.value(codes, scale.dtype), scale, zero)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``decode(code(x))`` without the detour through integers."""
        return self._from_unit(self.grid.snap(self._to_unit(x, scale, zero)), scale, zero)

    def _to_unit(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if self.zero is Zero.NONE:
            u = x / scale
        elif self.zero is Zero.OFFSET:
            u = (x - zero) / scale
        else:
            u = torch.add(x / scale, zero)
        return u if self.grid.width == 1 else u.unflatten(-1, (-1, self.grid.width))

    def _from_unit(self, v: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if self.grid.width > 1:
            v = v.flatten(-2)
        if self.zero is Zero.NONE:
            return v * scale
        return torch.addcmul(zero, v, scale) if self.zero is Zero.OFFSET else (v - zero) * scale

    def encode(self, x: Tensor, params: Params, generator: torch.Generator | None = None) -> QTensor:
        """``x`` on the grid with given parameters, rounded to nearest, or stochastically with a generator."""
        if self.scale is None:
            codes = self.code(x, torch.ones((), dtype=x.dtype, device=x.device), None, generator)
            return QTensor(codes=codes, scale=None, zero=None, format=self, shape=x.shape)
        self.block.check(x.shape)
        x = x if x.dtype == torch.float64 else x.float()
        scale = self._nonzero(value_of(params.scale)).to(x.dtype).unsqueeze(-1)
        zero = None if params.zero is None else params.zero.to(x.dtype).unsqueeze(-1)
        codes = self.code(self.block.split(x), scale, zero, generator)
        shape = x.shape if self.grid.width == 1 else (*x.shape[:-1], x.shape[-1] // self.grid.width)
        return QTensor(
            codes=self.block.join(codes, shape),
            scale=params.scale,
            zero=params.zero,
            format=self,
            shape=x.shape,
        )

    def quantize(self, x: Tensor, importance: Tensor | None = None) -> QTensor:
        """``encode(x, fit(x))``."""
        return self.encode(x, self.fit(x, importance))

    def columns(self, params: Params, shape: torch.Size, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero that the given columns of a matrix [out, in] see: [out or 1, len(columns)], float."""
        scale = self.block.take(self._nonzero(value_of(params.scale)), shape, columns)
        zero = None if params.zero is None else self.block.take(params.zero.to(scale.dtype), shape, columns)
        return scale, zero

    @property
    def rows_independent(self) -> bool:
        """True when rows of a matrix can be quantized apart with the same result: no block or scale spans
        rows.
        """
        return isinstance(self.block, Channel | Group) and self.scale is not None and self.scale.scale is None

    # -- size
    # ---------------------------------------------------------------------------------------------------

    def bits_per_weight(self, shape: torch.Size | tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of ``shape``: codes, scales, zeros, to any depth; no data
        needed.
        """
        n = math.prod(shape)
        bits = n // self.grid.width * self.grid.bits
        if self.scale is not None:
            blocks = self.block.scale_shape(shape)
            bits += math.prod(blocks) * (self.scale.bits_per_weight(blocks) + self.zero_bits)
        return bits / n

    def __str__(self) -> str:
        """Short name in the field's terms: 'int4 group 64 asymmetric (fp16 scales)'."""
        if self.scale is None:
            return self.grid.name
        shape = type(self.block).__name__.lower()
        sizes = "x".join(str(v) for v in vars(self.block).values())
        kind = {Zero.NONE: "symmetric", Zero.INTEGER: "asymmetric"}.get(self.zero, f"{self.zero} zero")
        return f"{self.grid.name} {shape}{' ' + sizes if sizes else ''} {kind} ({self.scale} scales)"
