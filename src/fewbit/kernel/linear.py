"""The linear layer on a quantized weight: y = x W^T + b, with W [out, in] decoded from codes.

Where the input is quantized too (W8A8), x is what its own codes mean. Symmetric int8 by int8, with one step
per token or tensor and one per row or tensor of W, is a product of integers, which torch has:

    y[t, o] = s_x[t] s_w[o] sum_j q_x[t, j] q_w[o, j] + b[o]

Everything else is multiplied in x's dtype after decoding, which is the same number up to float rounding.

``linear`` is the operation; ``IMPLEMENTATIONS`` are the ways to compute it, fastest first, the eager
reference last. The reference decodes the weight to x's dtype and multiplies; the arithmetic of the decoding
is that of ``QTensor.dequantize``, bit for bit. On a CPU it decodes as many rows at a time as the cache holds:
one token through 4096 x 4096 weights takes 3.3 ms instead of 33 (one core), because nothing of the decoded
weight reaches memory. Compiled loops (``compiled.py``) decode most formats in one pass, and for a few tokens
multiply a row while it is in the cache.

Shapes: x [..., in], y [..., out], scale and zero [out, groups].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.format.activation import Activation
from fewbit.format.block import Channel, Group, PerTensor
from fewbit.format.format import Format, Params, Zero
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.integer import Int
from fewbit.kernel import compiled
from fewbit.kernel.pick import Implementation, pick

_CACHED = 2**20  # decoded elements that stay in a CPU's cache
_SMALL = 2**16  # of a weight with fewer elements the eager way is as fast


def dequantize(q: QTensor, dtype: torch.dtype) -> Tensor:
    """``q.dequantize(dtype)``, without its intermediate copies for integer codes in groups or channels.

    Generation decodes every weight once per token, so each pass over memory counts.
    """
    fmt = q.format
    if not (isinstance(fmt.grid, Int) and isinstance(fmt.block, Group | Channel) and q.scale is not None):
        return q.dequantize(dtype)
    if fmt.zero not in (Zero.NONE, Zero.INTEGER):
        return q.dequantize(dtype)
    w = q.codes.to(torch.float32)
    blocks = w.unflatten(-1, (-1, fmt.block.size if isinstance(fmt.block, Group) else q.shape[-1]))
    if q.zero is not None:
        blocks.sub_(q.zero.unsqueeze(-1))
    blocks.mul_(value_of(q.scale).float().unsqueeze(-1))
    return w.to(dtype)


def _eager(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    activation: Activation | None = None,
    params: Params | None = None,
) -> Tensor:
    if activation is not None:
        x = activation(x, params)
    n, columns = weight.shape
    rows = max(1, _CACHED // columns)
    bias = None if bias is None else bias.to(x.dtype)
    if rows >= n or x.device.type != "cpu" or not weight.format.rows_independent:
        return F.linear(x, dequantize(weight, x.dtype), bias)
    pieces = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        w = dequantize(weight.rows(start, stop), x.dtype)
        pieces.append(F.linear(x, w, None if bias is None else bias[start:stop]))
    return torch.cat(pieces, -1)


def _int8(x: Tensor, weight: QTensor, bias: Tensor | None, activation: Activation, params: Params | None):
    rows = x.reshape(-1, x.shape[-1]).float()
    cuda, (n, columns) = x.device.type == "cuda", weight.shape
    if not len(rows) or (cuda and (n % 8 or columns % 8)):
        return _eager(x, weight, bias, activation, params)
    fmt = activation.format
    q = fmt.quantize(rows) if params is None else fmt.encode(rows, params)
    codes = q.codes
    if cuda and len(rows) <= 16:  # what cuBLAS asks for
        codes = F.pad(codes, (0, 0, 0, 17 - len(rows)))
    sums = torch._int_mm(codes, weight.codes.t())[: len(rows)]
    y = sums.float() * value_of(q.scale).float() * value_of(weight.scale).float().reshape(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _int8_supports(device: str, fmt: Format, dtype: torch.dtype, activation: Activation | None) -> bool:
    if activation is None or activation.outliers is not None or activation.centred:
        return False
    per_row = isinstance(fmt.block, Channel | PerTensor)
    per_token = isinstance(activation.format.block, Channel | PerTensor)
    whole = all(
        isinstance(f.grid, Int) and f.grid.signed and f.zero is Zero.NONE for f in (fmt, activation.format)
    )
    return device in ("cpu", "cuda") and whole and per_row and per_token


def _compiled(
    x: Tensor, weight: QTensor, bias: Tensor | None, activation: Activation | None, params: Params | None
):
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    small = weight.shape.numel() < _SMALL  # and nobody waits for a compiler on account of a toy
    run = None if learns or small or torch.compiler.is_compiling() else compiled.decoder(weight)
    if run is None:
        return _eager(x, weight, bias, activation, params)
    if activation is not None:
        x = activation(x, params)
    n, columns = weight.shape
    bias = None if bias is None else bias.to(x.dtype)
    tokens = x.numel() // columns
    if tokens <= compiled.FEW:
        y = compiled.multiply(run, x.reshape(-1, columns).float(), weight.shape).to(x.dtype)
        y = y.view(*x.shape[:-1], n)
        return y if bias is None else y + bias
    rows, pieces = max(1, _CACHED // columns), []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        w = compiled.decode(run, start, stop, columns).to(x.dtype)
        pieces.append(F.linear(x, w, None if bias is None else bias[start:stop]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _compiled_supports(device: str, fmt: Format, dtype: torch.dtype, activation: Activation | None) -> bool:
    return device == "cpu" and dtype != torch.float64 and compiled.supports(fmt)


EAGER = Implementation(name="eager", supports=lambda device, fmt, dtype, activation: True, run=_eager)
INT8 = Implementation(name="int8", supports=_int8_supports, run=_int8)
COMPILED = Implementation(name="compiled", supports=_compiled_supports, run=_compiled)
IMPLEMENTATIONS = (INT8, COMPILED, EAGER)


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    params: Params | None = None,
) -> Tensor:
    """x [..., in] float, weight [out, in], bias [out] or None -> [..., out] in x's dtype.

    activation: how x is quantized first, or None; params: the steps of a static one.
    """
    chosen = pick(IMPLEMENTATIONS, x.device.type, weight.format, x.dtype, activation)
    return chosen.run(x, weight, bias, activation, params)
