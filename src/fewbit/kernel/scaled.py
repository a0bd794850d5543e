"""The product of two quantized matrices: C = A B^T, with A [m, k] and B [n, k] as codes and steps.

    decoded   C = dq(A) dq(B)^T in float32, or in float64 where C is                    every format
    int8      C[i, j] = s_A[i] s_B[j] sum_k q_A[i, k] q_B[j, k],  sums in int32         a step a row or tensor
    scaled    the same of E4M3 and E5M2 codes on tensor cores (``torch._scaled_mm``)    CUDA from 8.9 on

``multiply`` takes the first of ``ROADS`` that supports the pair; the decoded one is the reference and stands
last. Steps that vary along k (groups, tiles) are decoded: no sum over k can be scaled once at its end.

``check_scaled_mm`` refuses on every device what CUDA refuses. The CPU's ``_scaled_mm`` takes odd sizes, rows
for columns and E5M2 x E5M2, so that a test that passes there proves nothing of a GPU.

FP8 matrices on tensor cores: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433. Sums of long rows on
Hopper keep about 14 bits where ``fast`` is on: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.

Road not taken: ``_scaled_mm`` on a CPU. It is the decoded product under another name and no faster
(512 x 512 x 512 on one core: 6.1 ms, decoded 5.3 and 2 for decoding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.errors import InputError
from fewbit.format.block import Channel, PerTensor
from fewbit.format.format import Zero
from fewbit.format.qtensor import QTensor
from fewbit.grid.floating import E4M3FN, E5M2
from fewbit.grid.integer import Int

ALIGNED = 16  # sides of FP8 matrices on tensor cores are multiples of this


@dataclass(frozen=True, kw_only=True)
class Road:
    """One way to multiply. supports: (a, b) -> bool; run: (a, b, dtype, fast) -> a b^T."""

    name: str
    supports: Callable[[QTensor, QTensor], bool]
    run: Callable[[QTensor, QTensor, torch.dtype, bool], Tensor]


def check_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    """Raise ``InputError`` for what ``torch._scaled_mm`` refuses on CUDA, whatever the device.

    a: FP8 [m, k], rows contiguous; b: FP8 [k, n], columns contiguous; scales: float32 steps, [] and [], or
    [m, 1] and [1, n].
    """
    if a.dtype not in _FP8 or b.dtype not in _FP8:
        raise InputError(f"FP8 products take E4M3 and E5M2, got {a.dtype} and {b.dtype}; quantize first")
    if a.dtype == b.dtype == torch.float8_e5m2:
        raise InputError("no tensor core multiplies E5M2 by E5M2; give one operand in E4M3")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"{list(a.shape)} by {list(b.shape)} is no product of matrices; give [m, k] and [k, n]"
        )
    if a.shape[1] % ALIGNED or b.shape[1] % ALIGNED:
        raise InputError(
            f"FP8 products need k and n in multiples of {ALIGNED}, got k = {a.shape[1]} and "
            f"n = {b.shape[1]}; pad with zeros"
        )
    if not a.is_contiguous() or not b.t().is_contiguous():
        raise InputError(
            "FP8 products need the first matrix by rows and the second by columns, got strides "
            f"{a.stride()} and {b.stride()}; call contiguous() on the first and on the second's transpose"
        )
    shapes = tuple(scale_a.shape), tuple(scale_b.shape)
    if shapes not in (((), ()), ((a.shape[0], 1), (1, b.shape[1]))):
        raise InputError(
            f"steps of shape {list(shapes[0])} and {list(shapes[1])} do not fit; give [] and [], or "
            f"[{a.shape[0]}, 1] and [1, {b.shape[1]}]"
        )
    if {scale_a.dtype, scale_b.dtype} != {torch.float32}:
        raise InputError(f"steps are float32, got {scale_a.dtype} and {scale_b.dtype}")
    if not (scale_a.is_contiguous() and scale_b.is_contiguous()):
        raise InputError("steps of rows lie one behind the other in memory; call contiguous() on them")


def scaled_mm(a: QTensor, b: QTensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T by ``torch._scaled_mm``; fast: shorter sums on Hopper. Raises ``InputError`` by CUDA's rules."""
    left = a.codes.contiguous().view(_DTYPES[a.format.grid])
    right = b.codes.contiguous().view(_DTYPES[b.format.grid]).t()
    s, t = a.scale, b.scale
    by_rows = s.ndim or t.ndim
    if by_rows:  # both or none
        s, t = s.expand(len(left), 1).contiguous(), t.expand(len(b.codes), 1).contiguous().view(1, -1)
    check_scaled_mm(left, right, s, t)
    half = (by_rows and left.is_cuda) or dtype == torch.float64  # by rows every version gives bfloat16
    out = torch.bfloat16 if half else dtype
    return torch._scaled_mm(left, right, s, t, out_dtype=out, use_fast_accum=fast).to(dtype)


def int8_mm(a: QTensor, b: QTensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T with exact sums of integers; fast means nothing here."""
    left, right = a.codes.contiguous(), b.codes.contiguous().t()
    rows = len(left)
    if left.is_cuda and rows <= 16:  # what cuBLAS asks for
        left = F.pad(left, (0, 0, 0, 32 - rows))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch._int_mm(left, right)[:rows].to(wide)
    return (sums * a.scale.to(wide) * b.scale.to(wide).reshape(-1)).to(dtype)


def decoded_mm(a: QTensor, b: QTensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a b^T from decoded values: the reference; fast means nothing here."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(a.codes.device.type, enabled=False):
        return (a.dequantize(wide) @ b.dequantize(wide).t()).to(dtype)


def _by_rows(q: QTensor) -> bool:
    plain = isinstance(q.scale, Tensor) and q.format.zero is Zero.NONE
    return plain and isinstance(q.format.block, Channel | PerTensor)


def _scaled_supports(a: QTensor, b: QTensor) -> bool:
    grids = a.format.grid, b.format.grid
    plain = _by_rows(a) and _by_rows(b) and a.scale.dtype == b.scale.dtype == torch.float32
    known = grids[0] in _DTYPES and grids[1] in _DTYPES and grids != (E5M2, E5M2)
    return a.codes.is_cuda and plain and known and _tensor_cores(a.codes.device)


def _int8_supports(a: QTensor, b: QTensor) -> bool:
    whole = all(isinstance(q.format.grid, Int) and q.format.grid.signed and _by_rows(q) for q in (a, b))
    even = not (a.shape[1] % 8 or b.shape[0] % 8)
    return whole and (a.codes.device.type == "cpu" or (a.codes.is_cuda and even))


@torch.compiler.assume_constant_result
def _tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


_DTYPES = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
_FP8 = tuple(_DTYPES.values())

INT8 = Road(name="int8", supports=_int8_supports, run=int8_mm)
SCALED = Road(name="scaled", supports=_scaled_supports, run=scaled_mm)
DECODED = Road(name="decoded", supports=lambda a, b: True, run=decoded_mm)
ROADS = (INT8, SCALED, DECODED)


def multiply(a: QTensor, b: QTensor, dtype: torch.dtype = torch.float32, fast: bool = False) -> Tensor:
    """a b^T [m, n] of a [m, k] and b [n, k], in ``dtype``, by the first road that supports the pair."""
    return next(road for road in ROADS if road.supports(a, b)).run(a, b, dtype, fast)
