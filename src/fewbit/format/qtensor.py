"""QTensor: a quantized tensor as plain data, canonical and unpacked.

``codes`` holds what the grid calls codes (an integer grid's integers, a float grid's bit patterns, a table's
indices) in the shape of the tensor; ``scale`` is a tensor or again a QTensor; ``zero`` is present when the
format has one. No kernel's or file's packing is known here: codecs in ``fewbit.io`` pack, kernels repack.

Road not taken: a torch.Tensor subclass (torchao). It composes with PyTorch for free and costs hundreds of
lines per format; nothing here needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fewbit.format.format import Format


@dataclass(frozen=True, eq=False, kw_only=True)
class QTensor:
    """Codes, scale and zero of one tensor, with the Format that gives them meaning.

    codes: ``format.grid.code_dtype`` [*shape[:-1], shape[-1] / grid.width]; scale: float tensor or QTensor of
    shape ``format.block.scale_shape(shape)``, None for a plain number format; zero: the same shape, or None.
    """

    codes: Tensor
    scale: Tensor | QTensor | None
    zero: Tensor | None
    format: Format
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that the codes mean, [*shape], computed in float32 and returned as ``dtype``."""
        block, scale = self.format.block, value_of(self.scale)
        unit = self.format.unit_values(self.codes)
        if scale is None:
            return unit.to(dtype)
        scale = scale.float().unsqueeze(-1)
        zero = None if self.zero is None else self.zero.float().unsqueeze(-1)
        blocks = self.format.from_unit(block.split(unit), scale, zero)
        return block.join(blocks, self.shape).to(dtype)

    @property
    def nbytes(self) -> float:
        """Bytes of everything that must be stored, densely packed: codes, scales, zeros, to any depth."""
        return self.bits_per_weight * math.prod(self.shape) / 8

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over elements: codes, scales, zeros, to any depth, densely packed."""
        bits = self.codes.numel() * self.format.grid.bits
        if isinstance(self.scale, QTensor):
            bits += 8 * self.scale.nbytes
        elif self.scale is not None:
            bits += 8 * self.scale.element_size() * self.scale.numel()
        if self.zero is not None:
            bits += self.format.zero_bits * self.zero.numel()
        return bits / math.prod(self.shape)

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows ``start`` to ``stop`` of a matrix [out, in]; only for formats whose rows are independent."""
        assert self.format.rows_independent, f"{self.format} couples rows"
        part = slice(start, stop)
        scale = self.scale
        if isinstance(scale, QTensor):
            shape = torch.Size((stop - start, *scale.shape[1:]))
            scale = QTensor(codes=scale.codes[part], scale=None, zero=None, format=scale.format, shape=shape)
        else:
            scale = scale[part]
        zero = None if self.zero is None else self.zero[part]
        shape = torch.Size((stop - start, *self.shape[1:]))
        return QTensor(codes=self.codes[part], scale=scale, zero=zero, format=self.format, shape=shape)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        scale = self.scale if self.scale is None else self.scale.to(device)
        zero = None if self.zero is None else self.zero.to(device)
        return QTensor(
            codes=self.codes.to(device), scale=scale, zero=zero, format=self.format, shape=self.shape
        )


def value_of(p: Tensor | QTensor | None) -> Tensor | None:
    """The numbers that a scale means, whether it is stored as a tensor or as a QTensor."""
    return p.dequantize() if isinstance(p, QTensor) else p
