"""Params: the steps, zeros and tables of a tensor, and how a Format finds them.

`fit` asks the range rule for the interval of each block, and makes of it what the format stores (see
``affine``); where points are learned, the rule finds tables for what the steps leave.

Shapes: x any shape that the block tiles; importance [in] or [in, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import Zero, nonzero, offset, raw_step
from fewbit.format.qtensor import QTensor, value_of

if TYPE_CHECKING:
    from fewbit.format.format import Format


@dataclass(frozen=True, kw_only=True)
class Params:
    """What ``Format.fit`` finds: the step as stored and the zero (or offset), one per block; the tables."""

    scale: Tensor | QTensor | None
    zero: Tensor | QTensor | None
    table: Tensor | QTensor | None = None

    def to(self, device: torch.device | str) -> Params:
        """The same on another device."""
        return Params(**{n: None if p is None else p.to(device) for n, p in vars(self).items()})


def fit(fmt: Format, x: Tensor, importance: Tensor | None = None, parent: Tensor | None = None) -> Params:
    """Steps and zeros for ``x`` (float, any shape the block tiles).

    importance: [in], the weight of an error in each column (diag of the Gram matrix), or the Gram matrix
    [in, in] itself; used by range rules that want it. parent: when ``x`` are the steps of another
    tensor, that tensor. Raises ``InputError`` for NaN or Inf, and where the block does not tile ``x``.
    """
    if fmt.scale is None and fmt.codebook is None:
        return Params(scale=None, zero=None)
    fmt.check(x.shape)
    # the sum tells at a fifth of the price; a graph, compiled or captured, cannot ask
    graph = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if not graph and not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(f"tensor of shape {list(x.shape)} holds {bad} NaN or Inf values; correct them")
    x = x if x.dtype == torch.float64 else x.float()
    if fmt.codebook is not None:
        return _learn(fmt, x, importance)
    mean = x.mean().to(fmt.zero_dtype) if fmt.zero is Zero.MEAN else None
    blocks = fmt.block.split(parent if fmt.range.of_parent else x if mean is None else x - mean)
    if importance is not None:
        importance = importance_of(fmt, importance.to(x.dtype), x, blocks.shape[-1])
    empty = not blocks.shape[-1]  # with one step all the same
    lo, hi = blocks.new_zeros(2, *blocks.shape[:-1]) if empty else fmt.range(blocks, fmt, importance)
    scale = fmt.store(raw_step(fmt, lo, hi), x)
    zero = mean if fmt.zero is Zero.MEAN else offset(fmt, lo, nonzero(value_of(scale)), scale)
    zero = zero if fmt.offsets is None else fmt.offsets.quantize(zero)
    return Params(scale=scale, zero=zero)


def _learn(fmt: Format, x: Tensor, importance: Tensor | None) -> Params:
    """Steps, then the tables of what the steps leave; importance as for `fit`."""
    scale, w = None, fmt.grid.width
    unit, cost = x, None
    if importance is not None and fmt.range.weighted:
        gram = importance.to(x.dtype)
        gram = gram.diag() if gram.ndim == 1 else gram
        own = torch.stack([gram[i : i + w, i : i + w] for i in range(0, len(gram), w)])
        at = torch.arange(len(own), device=x.device).expand(*x.shape[:-1], -1)
        cost = own[fmt.codebook.split(at, w)]
    if fmt.scale is not None:
        blocks = fmt.block.split(x)
        scale = fmt.store(raw_step(fmt, *fmt.range(blocks, fmt, None)), x)
        step = nonzero(value_of(scale)).to(x.dtype).unsqueeze(-1).expand_as(blocks)
        step = fmt.block.join(step, x.shape)
        unit = x / step
        if cost is not None:
            cost = cost * fmt.codebook.vectors(step, w)[..., :1, None].square()
    tables = fmt.range.tables(fmt.codebook.vectors(unit, w), fmt.grid, cost)
    return Params(scale=scale, zero=None, table=fmt.codebook.keep(tables))


def importance_of(fmt: Format, importance: Tensor, x: Tensor, n: int) -> Tensor:
    """What the range rule reads: a weight for each element, or the products of each block's columns."""
    if not fmt.range.of_products:
        weights = importance if importance.ndim == 1 else importance.diagonal()
        return fmt.block.split(weights.expand_as(x))
    gram = importance if importance.ndim == 2 else importance.diag()
    return torch.stack([gram[i : i + n, i : i + n] for i in range(0, x.shape[-1], n)])
