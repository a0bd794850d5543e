"""Weights whose columns were sorted before their groups were cut: GPTQ's act-order as files hold it.

    W[:, order] = rest        rest: a QTensor whose group k holds columns order[k g] ... order[(k + 1) g - 1]
    x W^T = x[:, order] rest^T

GPTQ files give the group of every column (``g_idx``) and leave the columns where they were. Here the columns
are stored as they are grouped, with the order beside them, so formats know groups of neighbours alone, and
a layer gathers its input once (a ``Permutation`` before it).

Road not taken: one step per column. It would be a plain QTensor, at 20 bits a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.qtensor import QTensor
from fewbit.transform.maps import Permutation


@dataclass(frozen=True, eq=False, kw_only=True)
class OrderedTensor:
    """A weight [out, in]: ``rest`` holds its columns in ``order`` [in] int64, which lists each once."""

    rest: QTensor
    order: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.rest.shape

    @property
    def map(self) -> Permutation:
        """What the input of ``rest`` takes first."""
        return Permutation(self.order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], its columns where they belong."""
        return self.map.invert(self.rest.dequantize(dtype))

    @property
    def nbytes(self) -> float:
        """Bytes of everything stored; the order in int32."""
        return self.rest.nbytes + 4 * len(self.order)

    @property
    def bits_per_weight(self) -> float:
        """The same in bits per element."""
        return 8 * self.nbytes / math.prod(self.shape)

    def to(self, device: torch.device | str) -> OrderedTensor:
        """The same on another device."""
        return replace(self, rest=self.rest.to(device), order=self.order.to(device))


def order_of(g_idx: Tensor, group: int, what: str) -> Tensor | None:
    """The order [in] int64 that makes the groups ``g_idx`` [in] contiguous; None where they are.

    Raises ``InputError`` for groups that do not hold ``group`` columns each; ``what`` names the tensor.
    """
    natural = torch.arange(len(g_idx)) // group
    g_idx = g_idx.cpu().long()
    if torch.equal(g_idx, natural):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], natural):
        raise InputError(
            f"{what} does not put {group} columns into each of {-(-len(g_idx) // group)} groups; the file is "
            "damaged, or has groups of several sizes, which is not read"
        )
    return order
