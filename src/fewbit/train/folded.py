"""FP8 products whose backward reads the codes of forward, the steps folded into the gradient.

    x ~ a q,  W ~ s w               y  = x W^T = a s (q w^T)
    G s ~ r g                       dx = G W   = r (g w)           s folded along the outputs before rounding,
    G a ~ c h                       dW = G^T x = c (h^T q)         a along the tokens

Row-wise training in the usual form rounds x and W twice, because a step a row may not lie along the sum
(``scalings.rowwise``), and reads every wide tensor twice or thrice. Here x and W are rounded once, one kernel
writes both layouts (``fewbit.kernel.cast``), and what waits for backward is one byte an element. A token of
large input weighs its gradient up by as much: that is its share of dW, so folding rounds finely what counts.

With one step a tensor the same holds and nothing is left to fold. Steps are powers of two; E4M3 holds x and
W, ``gradient`` is the grid of G. Sides that are no multiples of 16 are padded with zeros.

Shapes: x [m, k], W [n, k], G [m, n]; a, r [m, 1], s, c [n, 1], or [] with a step a tensor.

To move a scale from one operand into the other is SmoothQuant's migration (https://arxiv.org/abs/2211.10438,
eq. 3), here along the axis that is summed.

Road not taken: to fold G's row steps into q as well, so that G is rounded once. One token with large inputs
then costs the others their last binades, and the pass that it saves is 2 of 6 bytes an element of G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format import FP32, Channel, Format, PerTensor, QTensor
from fewbit.kernel.cast import GRIDS, cast_fp8, cast_gradient_fp8
from fewbit.kernel.scaled import ALIGNED, multiply

E4M3 = torch.float8_e4m3fn
# by dtype of the codes and axes of the steps; made once, because torch.compile traces no construction of them
FORMATS = {
    (dtype, axes): Format(grid=grid, block=block, scale=FP32)
    for dtype, grid in GRIDS.items()
    for axes, block in enumerate((PerTensor(), Channel()))
}


@dataclass(frozen=True, kw_only=True)
class Folded:
    """How a `LowLinear` computes: FP8 with a step per row, or per tensor, rounded once for both directions.

    by_rows: a step per token and output channel; else one a tensor. gradient: dtype of G, E4M3 or E5M2. fast:
    sums of about 14 bits on Hopper, of the forward product and of the two backward ones.
    """

    by_rows: bool = True
    gradient: torch.dtype = E4M3
    fast: tuple[bool, bool] = (True, False)
    history = 0  # steps are those of the tensor at hand

    def __post_init__(self):
        if self.gradient not in (E4M3, torch.float8_e5m2):
            raise InputError(
                f"gradients in {self.gradient} have no FP8 product; use float8_e4m3fn or float8_e5m2"
            )

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """x [m, k] w^T [k, n] in the dtype of x, differentiable in both."""
        if 0 in (*x.shape, *w.shape):  # a batch without tokens: nothing to round
            return x @ w.to(x.dtype).t()
        return FoldedProducts.apply(x, w, self)


class FoldedProducts(torch.autograd.Function):
    """See the module: forward, dx and dW on codes."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, how: Folded):
        ctx.how, ctx.shape, ctx.dtypes = how, (len(x), len(w), x.shape[1]), (x.dtype, w.dtype)
        q, qt, a = cast_fp8(_padded(x), _amax(x, how.by_rows), E4M3)
        c, ct, s = cast_fp8(_padded(w), _amax(w, how.by_rows), E4M3)
        ctx.save_for_backward(qt, a, ct, s)
        return multiply(coded(q, a), coded(c, s), x.dtype, how.fast[0])[: len(x), : len(w)]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (qt, a, ct, s), how, (m, n, k) = ctx.saved_tensors, ctx.how, ctx.shape
        grad = _padded(grad)
        if how.by_rows:
            g, r, ht, c = cast_gradient_fp8(grad, s, a, how.gradient)
            a = s = s.new_ones(())  # they are in the gradient's copies
        else:
            g, ht, r = cast_fp8(grad, _amax(grad, False), how.gradient)
            c = r
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = multiply(coded(g, r), coded(ct, s), ctx.dtypes[0], how.fast[1])[:m, :k]
        if ctx.needs_input_grad[1]:
            dw = multiply(coded(ht, c), coded(qt, a), ctx.dtypes[1], how.fast[1])[:n, :k]
        return dx, dw, None


def coded(codes: Tensor, step: Tensor) -> QTensor:
    """FP8 codes [r, c] and their steps, [r] or [], as the tensor that they are."""
    fmt = FORMATS[codes.dtype, step.ndim]
    step = step[:, None] if step.ndim else step
    return QTensor(
        codes=codes.view(fmt.grid.code_dtype), scale=step, zero=None, format=fmt, shape=codes.shape
    )


def _padded(x: Tensor) -> Tensor:
    """x [r, c] with zeros up to multiples of 16."""
    rows, columns = (-side % ALIGNED for side in x.shape)
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _amax(x: Tensor, by_rows: bool) -> Tensor:
    """Largest magnitudes of the rows of x, those added as padding included, or of x; float32."""
    if not by_rows:
        return x.abs().amax().float()
    return F.pad(x.abs().amax(1).float(), (0, -len(x) % ALIGNED))
