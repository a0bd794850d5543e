"""The casts of ``cast.py`` in Triton, for the tensor cores of Hopper and later.

A program reads one tile of the wide tensor, once, and stores its codes twice, the second time transposed;
the steps come from largest magnitudes by integer arithmetic on exponents, so they are exact. Largest
magnitudes of rows and columns at once take one more read, with atomic maxima on the bits of the floats, whose
order is that of non-negative numbers; NaN is above infinity there and wins.

Least traffic of x [M, N] in bfloat16, both copies: 4 MN bytes; of dy with its magnitudes: 6 MN.

Triton 3.6 writes a wrong transpose where the tile was loaded as float32: a quarter of the codes of a weight
of 256 x 768 differed on an H100, NaN among them, and the plain copy was right. So tiles of other dtypes than
bfloat16 are stored once, and torch transposes their bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # F_max = 1.75 * 2^this


@triton.jit
def _exponent(amax, TOP: tl.constexpr):
    """Exponent of the step: amax <= 1.75 * 2^(TOP + e)."""
    bits = amax.to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127 - TOP + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.minimum(tl.maximum(e, -126), 126)


@triton.jit
def _power(e, amax):
    """2^e, or NaN where the magnitude is infinite or NaN."""
    bits = tl.where(amax.to(tl.int32, bitcast=True) >= 0x7F800000, 0x7FC00000, (e + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _fp8(x, out):
    top: tl.constexpr = 448.0 if out.dtype.element_ty == tl.float8e4nv else 57344.0
    return tl.clamp(x, -top, top, propagate_nan=tl.PropagateNan.ALL).to(out.dtype.element_ty)


@triton.jit
def _cast(
    x, amax, q, qt, step, M, N, PER_ROW: tl.constexpr, TWICE: tl.constexpr, TOP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if PER_ROW:
        largest = tl.load(amax + m, mask=m < M, other=0.0)
    else:
        largest = tl.load(amax + m * 0)
    e = _exponent(largest, TOP)
    if tl.program_id(1) == 0:
        if PER_ROW:
            tl.store(step + m, _power(e, largest), mask=m < M)
        else:
            tl.store(step + m * 0, _power(e, largest))
    code = _fp8(value * _power(-e, largest)[:, None], q)
    tl.store(q + at, code, mask=inside)
    if TWICE:
        down = n.to(tl.int64)[:, None] * M + m[None, :]
        tl.store(qt + down, tl.trans(code), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _largest(dy, s, a, rows, columns, M, N, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr):
    """max_n |dy_mn| s_n into rows [M], max_m |dy_mn| a_m into columns [N]; both start at 0."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    weight = tl.load(a + m, mask=m < M, other=0.0)
    best = tl.zeros([BM], tl.int32)
    for tile in range(TILES):
        n = (tl.program_id(1) * TILES + tile) * BN + tl.arange(0, BN)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        value = tl.load(dy + at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        value = tl.abs(value.to(tl.float32))
        factor = tl.load(s + n, mask=n < N, other=0.0)
        left = (value * factor[None, :]).to(tl.int32, bitcast=True)
        right = (value * weight[:, None]).to(tl.int32, bitcast=True)
        best = tl.maximum(best, tl.max(left, 1))
        tl.atomic_max(columns + n, tl.max(right, 0), mask=n < N, sem="relaxed")
    tl.atomic_max(rows + m, best, mask=m < M, sem="relaxed")


@triton.jit
def _cast_gradient(
    dy, s, a, rows, columns, g, r, h, c, M, N, TWICE: tl.constexpr, TOP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    value = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(rows + m, mask=m < M, other=0.0)
    column = tl.load(columns + n, mask=n < N, other=0.0)
    er, ec = _exponent(row, TOP), _exponent(column, TOP)
    if tl.program_id(1) == 0:
        tl.store(r + m, _power(er, row), mask=m < M)
    if tl.program_id(0) == 0:
        tl.store(c + n, _power(ec, column), mask=n < N)
    # powers of two each: the order of the products changes no bit
    left = value * tl.load(s + n, mask=n < N, other=0.0)[None, :] * _power(-er, row)[:, None]
    tl.store(g + at, _fp8(left, g), mask=inside)
    right = value * tl.load(a + m, mask=m < M, other=0.0)[:, None] * _power(-ec, column)[None, :]
    code = _fp8(right, h)
    if TWICE:
        down = n.to(tl.int64)[:, None] * M + m[None, :]
        tl.store(h + down, tl.trans(code), mask=(n < N)[:, None] & (m < M)[None, :])
    else:
        tl.store(h + at, code, mask=inside)


def cast(x: Tensor, amax: Tensor, dtype: torch.dtype, tile=(64, 64), warps=4) -> tuple[Tensor, ...]:
    """``fewbit.kernel.cast.cast_fp8`` on CUDA; tile: rows and columns of a program."""
    x, (M, N) = x.contiguous(), x.shape
    q, qt = x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype)
    step = torch.empty_like(amax)
    BM, BN = tile
    grid = triton.cdiv(M, BM), triton.cdiv(N, BN)
    twice, top = x.dtype == torch.bfloat16, EXPONENT[dtype]
    _cast[grid](x, amax, q, qt, step, M, N, amax.ndim > 0, twice, top, BM, BN, num_warps=warps)
    return q, qt if twice else _transposed(q, qt), step


def cast_gradient(
    dy: Tensor, s: Tensor, a: Tensor, dtype: torch.dtype, tile=(64, 64), warps=4, look=(128, 128, 4)
) -> tuple[Tensor, ...]:
    """``fewbit.kernel.cast.cast_gradient_fp8`` on CUDA."""
    dy, (M, N) = dy.contiguous(), dy.shape
    rows, columns = torch.zeros(M + N, dtype=torch.float32, device=dy.device).split([M, N])
    BM, BN, tiles = look
    grid = triton.cdiv(M, BM), triton.cdiv(N, BN * tiles)
    bits = rows.view(torch.int32), columns.view(torch.int32)
    _largest[grid](dy, s, a, *bits, M, N, BM, BN, tiles, num_warps=4)
    twice, top = dy.dtype == torch.bfloat16, EXPONENT[dtype]
    g = dy.new_empty(M, N, dtype=dtype)
    h = dy.new_empty(N, M, dtype=dtype) if twice else torch.empty_like(g)
    r, c = torch.empty_like(a), torch.empty_like(s)
    BM, BN = tile
    grid = triton.cdiv(M, BM), triton.cdiv(N, BN)
    _cast_gradient[grid](dy, s, a, rows, columns, g, r, h, c, M, N, twice, top, BM, BN, num_warps=warps)
    return g, r, h if twice else _transposed(h, dy.new_empty(N, M, dtype=dtype)), c


def _transposed(codes: Tensor, out: Tensor) -> Tensor:
    """codes [M, N] as ``out`` [N, M], byte by byte."""
    out.view(torch.uint8).copy_(codes.view(torch.uint8).t())
    return out
