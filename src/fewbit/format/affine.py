"""Step and offset of an affine map between values and points of a grid: from an interval to what is stored.

    x ~ (value(q) - z) * s      z NONE (= 0), INTEGER (a code of the grid) or FLOAT (inside the rounding, HQQ)
    x ~ value(q) * s + m        m OFFSET, in value space (KIVI, quanto), or MEAN, one a tensor (bitsandbytes)

with one step ``s`` and one ``z`` or ``m`` per block. Order of computation (each line uses the result of the
one before): interval of the block -> raw step -> step as it is stored -> zero from the stored step -> codes
from stored step and zero. Computing the zero or the codes from the unrounded step is the usual mistake; it
costs up to half a step.

Sources: affine mapping, Jacob et al. 2017, https://arxiv.org/abs/1712.05877; two symmetric divisors and their
consequences are in docs/formats.md. Shapes: lo, hi, steps, zeros [*block.scale_shape(x.shape)].
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbit.format.fit import Progressive
from fewbit.format.qtensor import QTensor, value_of

if TYPE_CHECKING:
    from fewbit.format.format import Format

# Scales in one of these are kept as tensors of the dtype; any other grid makes the scale a QTensor.
NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Zero(StrEnum):
    """Which offset a format stores per block."""

    NONE = "none"  # symmetric
    INTEGER = "integer"  # a code of the grid: GPTQ, AWQ, compressed-tensors
    FLOAT = "float"  # a float in the code domain, inside the rounding: HQQ
    OFFSET = "offset"  # a float in the value domain: KIVI, quanto
    MEAN = "mean"  # the mean of the tensor, one float, in the value domain: bitsandbytes' nested steps


class Divisor(StrEnum):
    """How a symmetric interval becomes a step. They agree on every grid whose ends are opposite.

    The first two look at A, the larger end; SIGNED keeps its sign and so wants a range that tells the ends
    apart (min-max, MSE): what is largest lies on the outermost code, and a step may be negative.
    """

    EDGE = "edge"  # A / max: both ends exact, the most negative integer code unused
    FULL = "full"  # 2A / (max - min): all codes used, +A saturates (compressed-tensors)
    SIGNED = "signed"  # +-A / the end farther from zero: no code unused, nothing saturates (ggml's Q4_0)


def raw_step(fmt: Format, lo: Tensor, hi: Tensor) -> Tensor:
    """Unrounded step for [lo, hi]; 0 for a block that is all zero, or constant with OFFSET."""
    if fmt.symmetric and fmt.divisor is Divisor.SIGNED:
        return torch.where(-lo >= hi, lo, hi) / max(fmt.grid.min, fmt.grid.max, key=abs)
    if fmt.symmetric:
        return torch.maximum(-lo, hi) / fmt.reach
    if fmt.zero is Zero.INTEGER or fmt.offsets is not None:  # z is a code and 0.0 exact; coded m are <= 0
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    step = (hi - lo) / fmt.reach
    # lo / step of a float zero must stay finite: a constant block is its own step
    return torch.where(step > 0, step, lo.abs()) if fmt.zero is Zero.FLOAT else step


def stored_steps(fmt: Format, raw: Tensor, x: Tensor) -> Tensor | QTensor:
    """Raw steps of ``x`` as their own Format stores them, see `Format.store`."""
    own = fmt.scale
    dtype = NATIVE.get(own.grid.name) if own.scale is None else None
    if dtype is not None:
        info = torch.finfo(dtype)
        tile = fmt.grid.height > 1 or fmt.codebook is not None  # nothing there need be all zero
        unused = 0.0 if tile else 1.0 - fmt.grid.snap(raw.new_zeros(fmt.grid.width)).any().to(raw.dtype)
        # float16 begins at 6.1e-5, above the steps of some 8-bit weights: there subnormals serve as well
        least = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
        size = torch.where(raw.abs() > 0, raw.abs(), unused).clamp(least, info.max)  # NaN is no step
        return torch.copysign(size, raw).to(dtype)
    if not getattr(own.grid, "zero", True):  # powers of two: upwards, or up to 1.5 max would be clipped
        significand, e = torch.frexp(raw)
        up = torch.ldexp(torch.ones_like(raw), e - (significand == 0.5).int())
        raw = torch.where(raw > 0, up, 0.0)
    params = own.fit(raw, parent=x)
    if own.zero is Zero.NONE:
        unit = torch.ones_like(raw)
        if params.scale is not None:
            outer = value_of(params.scale).to(raw.dtype).abs().unsqueeze(-1)
            unit = own.block.join(outer * torch.ones_like(own.block.split(raw)), raw.shape)
        raw = torch.copysign(torch.maximum(raw.abs(), own.grid.least * unit), raw)
        if isinstance(own.range, Progressive):
            raw = torch.minimum(raw, own.range.most(fmt) * unit)
    return own.encode(raw, params)


def nonzero(scale: Tensor) -> Tensor:
    """Steps safe to divide by: a stored step of exactly 0 (a nested offset can give one) acts as 1."""
    scale = scale.float() if scale.dtype != torch.float64 else scale
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def offset(fmt: Format, lo: Tensor, scale: Tensor, stored: Tensor | QTensor | None = None) -> Tensor | None:
    """Zero point or offset of blocks that start at ``lo``, from the step's value and as it is stored."""
    if fmt.zero is Zero.NONE:
        return None
    if fmt.zero is Zero.OFFSET:
        top = torch.finfo(fmt.zero_dtype).max
        m = lo - fmt.grid.min * scale
        return m.clamp(-top, top if fmt.offsets is None else 0.0).to(fmt.zero_dtype)
    if fmt.zero is Zero.FLOAT:
        return (fmt.grid.min - lo / scale).to(fmt.zero_dtype)
    z = (fmt.grid.min - lo.clamp(max=0) / scale).round().clamp(fmt.grid.min, fmt.grid.max)
    if isinstance(stored, QTensor) and isinstance(stored.format.range, Progressive):
        z = stored.format.range.inside(z, stored.codes, fmt)
    return z.to(fmt.grid.code_dtype)
