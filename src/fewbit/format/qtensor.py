"""QTensor: a quantized tensor as plain data, canonical and unpacked.

``codes`` holds what the grid calls codes (an integer grid's integers, a float grid's bit patterns, a table's
indices) in the shape of the tensor; ``scale`` is a tensor or again a QTensor; ``zero`` is present when the
format has one. No kernel's or file's packing is known here: codecs in ``fewbit.io`` pack, kernels repack.

Road not taken: a torch.Tensor subclass (torchao). It composes with PyTorch for free and costs hundreds of
lines per format; nothing here needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fewbit.format.format import Format


@dataclass(frozen=True, eq=False, kw_only=True)
class QTensor:
    """Codes, scale and zero of one tensor, with the Format that gives them meaning.

    codes: ``format.grid.code_dtype`` [*shape[:-1], shape[-1] / grid.width]; scale: float tensor or QTensor of
    shape ``format.block.scale_shape(shape)``, None for a plain number format; zero: the same, or None;
    table: learned points, float tensor or QTensor [tables, grid.entries], where the format has a codebook.
    """

    codes: Tensor
    scale: Tensor | QTensor | None
    zero: Tensor | QTensor | None
    format: Format
    shape: torch.Size
    table: Tensor | QTensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that the codes mean, [*shape], computed in float32 and returned as ``dtype``."""
        block, scale = self.format.block, value_of(self.scale)
        unit = self.format.unit_values(self.codes, table=self.table)
        if scale is None:
            return unit.to(dtype)
        scale = scale.float().unsqueeze(-1)
        zero = None if self.zero is None else value_of(self.zero).float().unsqueeze(-1)
        blocks = self.format.from_unit(block.split(unit), scale, zero)
        return block.join(blocks, self.shape).to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> float:
        """Bytes of everything that must be stored, densely packed: codes, scales, zeros, tables."""
        return self.bits_per_weight * math.prod(self.shape) / 8

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over elements: codes, scales, zeros, to any depth, densely packed."""
        bits = self.codes.numel() * self.format.grid.bits
        parts = (self.scale, self.table, self.zero if isinstance(self.zero, QTensor) else None)
        bits += sum(8 * p.nbytes for p in parts if p is not None)
        if isinstance(self.zero, Tensor):
            bits += self.format.zero_bits * self.zero.numel()
        return bits / math.prod(self.shape)

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows ``start`` to ``stop`` of a matrix [out, in]; only for formats whose rows are independent."""
        assert self.format.rows_independent, f"{self.format} couples rows"
        return self._part(slice(start, stop))

    def _part(self, part: slice) -> QTensor:
        shape = torch.Size((part.stop - part.start, *self.shape[1:]))
        cut = lambda p: p._part(part) if isinstance(p, QTensor) else None if p is None else p[part]  # noqa: E731
        held = {"scale": cut(self.scale), "zero": cut(self.zero), "table": cut(self.table)}
        return replace(self, codes=self.codes[part], shape=shape, **held)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        held = {n: getattr(self, n) for n in ("codes", "scale", "zero", "table")}
        return replace(self, **{n: None if p is None else p.to(device) for n, p in held.items()})


def value_of(p: Tensor | QTensor | None) -> Tensor | None:
    """The numbers that a scale means, whether it is stored as a tensor or as a QTensor."""
    return p.dequantize() if isinstance(p, QTensor) else p
