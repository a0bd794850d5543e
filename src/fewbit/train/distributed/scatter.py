"""FSDP2 that reduces gradients in 8 bits: its reduce-scatter, with one power of two for 128 elements.

    for module in (*model.blocks, model): module.set_custom_reduce_scatter(BlockReduceScatter())

FSDP2 hands over the gradients of a whole group of weights as one flat buffer, rank after rank, so a tensor's
own step is out of reach and blocks have to do. Each rank sends to each other its part in 8 bits, codes and
steps in one all-to-all, and sums what arrives in float32:

    sent by a rank  (W - 1) / W n (1 + 1 / 128) bytes,  half of bfloat16's reduce-scatter

Every number is rounded once, on the rank that has it; the sum is not rounded and cannot saturate, so there is
no factor mu. A block with NaN or Inf arrives as NaN.

Shapes: W ranks; the buffer [W * m], the part of a rank [m].
Road not taken: one step for the buffer. It holds weights, norms and biases, whose gradients differ by orders.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import QTensor, Scaling
from fewbit.format.named import mx
from fewbit.train.products import steps


class BlockReduceScatter:
    """For ``set_custom_reduce_scatter`` of a module under `fully_shard`; block: elements sharing a step."""

    def __init__(self, block: int = 128):
        self.format = mx("e4m3fn", rule=Scaling.RCEIL, block=block)

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a buffer that is handed over or filled."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        """Fill ``output_tensor`` [m] from ``input_tensor`` [W * m] of all ranks of ``group``.

        Raises ``InputError`` for reductions other than sum and average.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise InputError(f"gradients in 8 bits are summed or averaged, got {op}; set no divide factor")
        world, fmt = dist.get_world_size(group), self.format
        rows = input_tensor.view(world, -1)
        missing = -rows.shape[1] % fmt.block.size
        rows = torch.nn.functional.pad(rows, (0, missing)).float()
        q = fmt.encode(rows, steps(fmt, rows))
        sent = torch.cat([q.codes.view(torch.uint8), q.scale.codes.view(torch.uint8)], 1)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        codes, scales = got.split([rows.shape[1], got.shape[1] - rows.shape[1]], 1)
        total = torch.zeros(rows.shape[1], device=rows.device)
        for c, s in zip(codes, scales, strict=True):
            scale = QTensor(codes=s, scale=None, zero=None, format=fmt.scale, shape=s.shape)
            total += QTensor(codes=c, scale=scale, zero=None, format=fmt, shape=c.shape).dequantize()
        total = total[: output_tensor.numel()]
        output_tensor.copy_(total / world if op == dist.ReduceOp.AVG else total)
        return
