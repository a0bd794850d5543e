"""Casts to FP8 for training on GPUs: one read of a wide tensor gives both copies that the products need.

Tensor cores of Hopper contract FP8 operands along their contiguous axis only, so what goes into two products
is wanted twice, once transposed. With a step per row the copies differ in more than layout: a step may not
vary along the contracted axis. Casting twice is what row-wise training loses its time with. Here a row's step
that would lie on the contracted axis is folded into the other operand before that one is rounded:

    y  = x W^T        x ~ a_m q_mk      W ~ s_n w_nk              y_mn  = a_m s_n  sum_k q_mk w_nk
    dx = dy W         dy_mn s_n ~ r_m g_mn                        dx_mk = r_m      sum_n g_mn w_nk
    dW = dy^T x       dy_mn a_m ~ c_n h_mn                        dW_nk = c_n      sum_m h_mn q_mk

so x and W are rounded once, backward reads their codes transposed, and only dy is rounded twice. Folding
costs no precision: a float's relative error does not depend on its size, and the steps are powers of two.
With one step per tensor the same kernels run with steps of one element.

    step = 2^ceil(log2(amax / F_max)),  F_max = 448 (E4M3) or 57344 (E5M2)

What runs without CUDA is the eager reference, in terms of ``Format``, and gives the same bits. A block that
holds NaN or an infinity becomes NaN.

Shapes: x [M, K], W [N, K], dy [M, N]; steps a, r [M] or [], s, c [N] or []; q [M, K], q^T [K, M], all row by
row in memory.

Road not taken: to let the compiler write the casts. A block of a Llama then takes 3.0 to 3.5 times as long
(``rowwise`` and ``tensorwise`` beside the folded ways in benchmarks/results/fp8_block.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.format import Channel, Format, PowerOfTwo, Scaling
from fewbit.format.affine import raw_step
from fewbit.format.named import FP32
from fewbit.format.params import Params
from fewbit.grid.floating import E4M3FN, E5M2

DTYPES = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
GRIDS = {dtype: grid for grid, dtype in DTYPES.items()}


def rows(dtype: torch.dtype) -> Format:
    """The Format of the copies: float32 powers of two, one a row."""
    return Format(grid=GRIDS[dtype], block=Channel(), range=PowerOfTwo(rule=Scaling.RCEIL), scale=FP32)


def _encode(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and steps of x [M, N] float32 by largest magnitudes: of its rows [M], or of all of it []."""
    fmt = rows(dtype)
    finite = amax.isfinite()
    lo, hi = fmt.range(amax.where(finite, 0).reshape(-1, 1), fmt, None)
    step = raw_step(fmt, lo, hi).float().clamp(min=2.0**-126)  # least normal float32, as ``Format.store``
    step = step.reshape(amax.shape).masked_fill(~finite, torch.nan)
    q = fmt.encode(x, Params(scale=step.expand(len(x)).unsqueeze(-1), zero=None))
    return q.codes.view(dtype), step


def _cast(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, step = _encode(x.float(), amax, dtype)
    return q, q.t().contiguous(), step


def _cast_gradient(dy: Tensor, s: Tensor, a: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    left, right = dy.float() * s, (dy.float() * a[:, None]).t().contiguous()
    (g, r), (h, c) = (_encode(x, x.abs().amax(1), dtype) for x in (left, right))
    return g, r, h, c


def _cast_meta(x, amax, dtype):
    M, N = x.shape
    return x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype), torch.empty_like(amax)


def _cast_gradient_meta(dy, s, a, dtype):
    M, N = dy.shape
    g, h = dy.new_empty(M, N, dtype=dtype), dy.new_empty(N, M, dtype=dtype)
    return g, torch.empty_like(a), h, torch.empty_like(s)


def _on_gpu(name: str):
    def run(*args):
        from fewbit.kernel import cast_triton  # needs Triton

        return getattr(cast_triton, name)(*args)

    return run


# Functional operators: a compiled graph merges equal casts, such as those of one input for q, k and v.
LIBRARY = torch.library.Library("fewbit", "FRAGMENT")
LIBRARY.define("cast_fp8(Tensor x, Tensor amax, ScalarType dtype) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "cast_gradient_fp8(Tensor dy, Tensor s, Tensor a, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _eager, _meta in (
    ("cast", _cast, _cast_meta),
    ("cast_gradient", _cast_gradient, _cast_gradient_meta),
):
    LIBRARY.impl(f"{_name}_fp8", _eager, "CPU")
    LIBRARY.impl(f"{_name}_fp8", _on_gpu(_name), "CUDA")
    LIBRARY.impl(f"{_name}_fp8", _meta, "Meta")


def cast_fp8(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, N] -> codes [M, N], their transpose [N, M], steps of the shape of ``amax``.

    x: float32, float16 or bfloat16; amax: largest magnitudes of the rows [M] or of x [], float32; dtype:
    float8_e4m3fn or float8_e5m2.
    """
    return torch.ops.fewbit.cast_fp8(x, amax, dtype)


def cast_gradient_fp8(
    dy: Tensor, s: Tensor, a: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [M, N] -> g [M, N], r [M], h^T [N, M], c [N]; s [N]: steps of the weight's rows, a [M]: the input's.

    What the two products of backward contract: dy_mn s_n ~ r_m g_mn and dy_mn a_m ~ c_n h_mn.
    """
    return torch.ops.fewbit.cast_gradient_fp8(dy, s, a, dtype)
