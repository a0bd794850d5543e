"""Fake quantization: a tensor through its Format and back, with gradients for the ends of its intervals.

    s = stored((hi - lo) / reach)     z = stored(z(lo, s))     x^ = from_unit( snap( to_unit(x, s, z) + V ) )

Every rounding (of x, of the step and of the zero to their storage) is passed straight through: forward the
stored number, backward the identity (Bengio, Leonard, Courville 2013, https://arxiv.org/abs/1308.3432). The
gradient of what saturates stops at the grid (x is no longer free there) and goes on to s and z:

    dx^/ds = (v - z) - u',  dx^/dV = s    inside, u' = x / s        dx^/ds = v - z,  dx^/dV = 0    outside

which for z = 0 and V = 0 is the gradient of LSQ (Esser et al. 2019, https://arxiv.org/abs/1902.08153, eq. 3).
"Inside" is decided after the rounding: what lies within half a step of the last point still rounds to it.

Forward is the arithmetic of ``Format`` itself, so the codes of ``export`` mean exactly what was trained on.
Shapes: x in blocks [*scale_shape, n] (``Block.split``); lo, hi, s, z [*scale_shape]; V as the blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import Zero, nonzero, offset, raw_step
from fewbit.format.format import Format
from fewbit.format.params import Params, importance_of
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.integer import Int


class Through(torch.autograd.Function):
    """``Through.apply(x, value, mask)``: forward ``value``, backward the gradient to ``x`` where ``mask``."""

    @staticmethod
    def forward(ctx, x, value, mask=None):
        ctx.save_for_backward(mask)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return (grad if mask is None else grad * mask), None, None


@dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """Steps and zeros of blocks as they are stored (``params``) and with gradients [*scale_shape, 1]."""

    format: Format
    params: Params
    scale: Tensor
    zero: Tensor | None


def steps(fmt: Format, lo: Tensor, hi: Tensor, x: Tensor) -> Steps:
    """Steps of the intervals [lo, hi] of tensor ``x``, differentiable in both; float32 or float64.

    Raises ``InputError`` for formats without steps, of vectors, or whose zero is the mean of the tensor.
    """
    check(fmt)
    raw = raw_step(fmt, lo, hi)
    with torch.no_grad():
        stored = fmt.store(raw, x)
        value = nonzero(value_of(stored)).to(raw.dtype)
        zero = offset(fmt, lo, value, stored)
    scale = Through.apply(raw, value)
    if zero is None:
        soft = None
    elif fmt.zero is Zero.OFFSET:
        soft = Through.apply(lo - fmt.grid.min * scale, zero.to(raw.dtype))
    else:
        start = lo.clamp(max=0) if fmt.zero is Zero.INTEGER else lo
        soft = Through.apply(fmt.grid.min - start / scale, zero.to(raw.dtype))
    params = Params(scale=stored, zero=zero)
    zero = None if soft is None else soft.unsqueeze(-1)
    return Steps(format=fmt, params=params, scale=scale.unsqueeze(-1), zero=zero)


def interval(fmt: Format, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the range rule of the format finds for ``x``: lo, hi [*scale_shape]; importance as for `fit`."""
    check(fmt)
    blocks = fmt.block.split(x)
    if importance is not None:
        importance = importance_of(fmt, importance.to(x.dtype), x, blocks.shape[-1])
    lo, hi = fmt.range(blocks, fmt, importance)
    return lo.to(x.dtype), hi.to(x.dtype)


def fake(blocks: Tensor, at: Steps, nudge: Tensor | None = None) -> Tensor:
    """``blocks`` on the grid, each moved by ``nudge`` steps before it is rounded; same shape and dtype."""
    u = _unit(blocks, at, nudge)
    with torch.no_grad():
        low, high = limits(at.format)
        snapped, inside = at.format.grid.snap(u), (u >= low) & (u <= high)
    return at.format.from_unit(Through.apply(u, snapped, inside), at.scale, at.zero)


@torch.no_grad()
def export(x: Tensor, at: Steps, nudge: Tensor | None = None) -> QTensor:
    """``fake`` as codes: ``dequantize()`` gives the same numbers, bit for bit."""
    fmt = at.format
    unit = fmt.block.join(_unit(fmt.block.split(x), at, nudge), x.shape)
    scale, zero = at.params.scale, at.params.zero
    return QTensor(codes=fmt.grid.round(unit), scale=scale, zero=zero, format=fmt, shape=x.shape)


def check(fmt: Format) -> None:
    """Raise ``InputError`` for a format whose steps cannot be learned."""
    if fmt.scale is None or fmt.codebook or fmt.grid.width > 1 or fmt.zero is Zero.MEAN:
        raise InputError(
            f"steps of {fmt} cannot be learned; use a scalar grid with steps, such as int4 in groups of 64"
        )


def _unit(blocks: Tensor, at: Steps, nudge: Tensor | None) -> Tensor:
    u = at.format.to_unit(blocks, at.scale, at.zero)
    return u if nudge is None else u + nudge


def gaps(blocks: Tensor, at: Steps) -> Tensor | float:
    """Distance between the two points of the grid around each element, in steps: 1 for integers."""
    if isinstance(at.format.grid, Int):
        return 1.0
    points = _points(at.format).to(blocks)
    above = torch.bucketize(_unit(blocks, at, None), points).clamp(1, len(points) - 1)
    return points.diff()[above - 1]


def limits(fmt: Format) -> tuple[float, float]:
    """Half a gap below the lowest and above the highest point of the grid: beyond, values saturate."""
    points = _points(fmt)
    low, high = (points[0] - points[1]).item() / 2, (points[-1] - points[-2]).item() / 2
    return points[0].item() + low, points[-1].item() + high


@functools.lru_cache(maxsize=256)
def _points(fmt: Format) -> Tensor:
    """The finite points of the grid, in steps, ascending: [k] float64."""
    points = fmt.unit_points()
    return fmt.grid.min + (points - points[0]) / (points[-1] - points[0]) * (fmt.grid.max - fmt.grid.min)
