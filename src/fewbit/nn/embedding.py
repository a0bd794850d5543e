"""QEmbedding: a table of embeddings held as a QTensor. A thin shell: buffers, and the rows asked for.

    e = W[ids]        W [n, d] decoded from codes, scale and zero, the rows of the call alone

Buffers have the names of ``QLinear``, and files the same names packed. Rows are decoded one by one where a
step belongs to a row or to the table; formats that couple rows decode the whole table at every call.

The road not taken: ``torch.nn.Embedding`` over a decoded table. It takes the memory of the float model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit.format.block import PerTensor
from fewbit.format.qtensor import QTensor
from fewbit.nn.linear import _flatten, _gather
from fewbit.nn.stored import Stored


class QEmbedding(Stored):
    """``num_embeddings`` rows of ``embedding_dim``, which come out in ``dtype``; that follows ``to``."""

    follows = ("like",)

    def __init__(self, qweight: QTensor, dtype: torch.dtype = torch.float32):
        """The tensors of ``qweight`` [n, d] are taken as they are, not copied."""
        super().__init__()
        self.format, self.shape = qweight.format, torch.Size(qweight.shape)
        self.num_embeddings, self.embedding_dim = self.shape
        for name, tensor in _flatten(qweight).items():
            self.register_buffer(name, tensor)
        like = torch.empty(0, dtype=dtype, device=qweight.codes.device)
        self.register_buffer("like", like, persistent=False)

    @property
    def qweight(self) -> QTensor:
        """The table over this module's buffers (no copy)."""
        return _gather(self.format, self.shape, self._buffers)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., d]."""
        table, dtype = self.qweight, self.like.dtype
        own = self.format
        if own.codebook is not None or not (own.rows_independent or own.block == PerTensor()):
            return nn.functional.embedding(ids, table.dequantize(dtype))
        at, parts = ids.flatten(), (table.codes, table.scale, table.zero)
        codes, scale, zero = (p if p is None or p.ndim == 0 else p[at] for p in parts)
        shape = torch.Size((len(at), self.embedding_dim))
        rows = replace(table, codes=codes, scale=scale, zero=zero, shape=shape).dequantize(dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"
