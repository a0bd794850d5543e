"""Codebook: whose points are learned, and how their tables are kept.

The blocks of a tensor that share a table need not be those that share a step: a step for each row and a
table for each tile of 256 columns is a Format whose block is Channel and whose codebook's block is Tiles.
Tables are the rows of a matrix, so they have a Format, too: FP16 (AQLM), or 8 bits and a step each (GPTVQ).

Shapes: T tables [T, M, K, w] of M books of K entries in R^w; vectors [T, N, w], codes [T, N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import NATIVE
from fewbit.format.block import Block, Tiles
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.learned import Learned

if TYPE_CHECKING:
    from fewbit.format.format import Format


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Whose points are learned: the blocks of a tensor that share a table, and how tables are stored.

    store: a plain FP16, BF16 or FP32, or any format with steps, of the matrix [tables, grid.entries].
    """

    block: Block
    store: Format

    def __post_init__(self):
        if self.store.scale is None and self.store.grid.name not in NATIVE:
            raise InputError(f"tables cannot be stored as {self.store}; give FP16, or a format with steps")

    def shape(self, grid: Learned, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Tables and numbers in each for a tensor of ``shape``."""
        return math.prod(self.block.scale_shape(shape)), grid.entries

    def keep(self, tables: Tensor) -> Tensor | QTensor:
        """Tables [T, M, K, w] as they are stored."""
        tables, own = tables.flatten(1), self.store
        return tables.to(NATIVE[own.grid.name]) if own.scale is None else own.quantize(tables)

    def points(self, table: Tensor | QTensor, grid: Learned, dtype: torch.dtype = torch.float32) -> Tensor:
        """Stored tables -> [T, M, K, w]."""
        return value_of(table).to(dtype).view(-1, grid.books, 2**grid.entry_bits, grid.width)

    def vectors(self, x: Tensor, width: int) -> Tensor:
        """The vectors of x [..., in] by the table they share, [T, N, w]."""
        tables = math.prod(self.block.scale_shape(x.shape))
        return self.block.split(x).reshape(tables, -1, width)

    def join(self, parts: Tensor, shape: torch.Size | tuple[int, ...], width: int) -> Tensor:
        """Inverse of `vectors` for the codes [T, N] of a tensor of ``shape``: [..., in / w]."""
        own, codes = self._narrow(shape, width)
        return own.join(parts.view(*own.scale_shape(codes), -1), codes)

    def split(self, codes: Tensor, width: int) -> Tensor:
        """Inverse of `join`: codes [..., in / w] by table, [T, N]."""
        own, _ = self._narrow((*codes.shape[:-1], codes.shape[-1] * width), width)
        return own.split(codes).reshape(math.prod(own.scale_shape(codes.shape)), -1)

    def _narrow(self, shape, width: int) -> tuple[Block, tuple[int, ...]]:
        """The block and the shape when ``width`` columns are one."""
        own = self.block.of(shape) if isinstance(self.block, Tiles) else self.block
        side = next((name for name in ("cols", "size") if hasattr(own, name)), None)
        own = replace(own, **{side: getattr(own, side) // width}) if side else own
        return own, (*shape[:-1], shape[-1] // width)
