"""The linear layer on a quantized weight: y = x W^T + b, with W [out, in] decoded from codes.

``linear`` is the operation; ``IMPLEMENTATIONS`` are the ways to compute it, fastest first, the eager reference
last. The reference decodes the whole weight to x's dtype and multiplies: the arithmetic of the decoding is
``QTensor.dequantize``'s, bit for bit.

Shapes: x [..., in], y [..., out], scale and zero [out, groups].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.format.block import Channel, Group
from fewbit.format.format import Zero
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.integer import Int
from fewbit.kernel.pick import Implementation, pick


def dequantize(q: QTensor, dtype: torch.dtype) -> Tensor:
    """``q.dequantize(dtype)``, without its intermediate copies for integer codes in groups or channels.

    Generation decodes every weight once per token, so each pass over memory counts.
    """
    format = q.format
    if not (isinstance(format.grid, Int) and type(format.block) in (Group, Channel) and q.scale is not None):
        return q.dequantize(dtype)
    if format.zero not in (Zero.NONE, Zero.INTEGER):
        return q.dequantize(dtype)
    w = q.codes.to(torch.float32)
    blocks = w.unflatten(-1, (q.shape[-1] // _run(format.block, q.shape), -1))
    if q.zero is not None:
        blocks.sub_(q.zero.unsqueeze(-1))
    blocks.mul_(value_of(q.scale).float().unsqueeze(-1))
    return w.to(dtype)


def _run(block: Group | Channel, shape: torch.Size) -> int:
    """Neighbours in a row that share a step."""
    return block.size if isinstance(block, Group) else shape[-1]


def _eager(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))


EAGER = Implementation(name="eager", supports=lambda device, fmt, dtype: True, run=_eager)
IMPLEMENTATIONS = (EAGER,)


def linear(x: Tensor, weight: QTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] float, weight [out, in], bias [out] or None -> [..., out] in x's dtype."""
    return pick(IMPLEMENTATIONS, x.device.type, weight.format, x.dtype).run(x, weight, bias)
