"""How the input of a layer is quantized before the product.

    dynamic   steps of x [..., tokens, in] are fitted at every call (per token, or one for the call)
    static    steps were fitted on calibration inputs and are stored: per tensor, or per group of columns
              ("per embedding group", Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948)
    outliers  columns in which any |x| of the call reaches the threshold skip the rounding (LLM.int8():
              Dettmers, Lewis, Belkada, Zettlemoyer 2022, https://arxiv.org/abs/2208.07339, section 3.2), and
              the steps are fitted without them

Steps of static ranges: the format's range rule on a sample of calibration tokens that always contains the
extremes of every column (min-max, percentile, MSE, ACIQ, OCTAV), or with ``momentum`` the moving average
m * old + (1 - m) * new of the range of each batch (Quanto, 0.9).

The road not taken: a second Format for the outlier columns. What is not rounded needs no format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.block import Channel, Columns, Group, PerTensor, Token
from fewbit.format.fit import MinMax
from fewbit.format.format import Format, Params


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The Format of a layer's input, when its steps are fitted, and which columns are left out."""

    format: Format
    static: bool = False
    momentum: float | None = None
    outliers: float | None = None

    def __post_init__(self):
        own = self.format
        if own.scale is None or own.grid.width > 1:
            raise InputError(f"activations need a scalar format with steps, got {own}")
        if self.static and not isinstance(own.block, PerTensor | Columns):
            raise InputError(
                f"static steps cannot follow tokens: use PerTensor() or Columns(n), got {own.block}"
            )
        if not self.static and not isinstance(own.block, PerTensor | Token | Channel | Group | Columns):
            raise InputError(f"dynamic steps are per tensor, token, group or column, got {own.block}")
        if self.momentum is not None and not (self.static and 0 <= self.momentum < 1):
            raise InputError(
                f"momentum {self.momentum} needs static steps and a value in [0, 1); 0.9 is usual"
            )
        if self.outliers is not None and not (self.outliers > 0 and not self.static):
            raise InputError(
                f"an outlier threshold of {self.outliers} needs dynamic steps and must be positive"
            )

    def __call__(self, x: Tensor, params: Params | None = None) -> Tensor:
        """x [..., in] through the grid and back, in x's dtype; ``params``: stored steps of a static one."""
        if x.numel() == 0:
            return x
        rows = x.reshape(-1, x.shape[-1])
        wide = None
        if self.outliers is not None:
            wide = rows.abs().amax(0) >= self.outliers
            kept, rows = rows, rows.masked_fill(wide, 0)
        rows = rows.float()
        q = self.format.quantize(rows) if params is None else self.format.encode(rows, params)
        out = q.dequantize(x.dtype)
        return (out if wide is None else torch.where(wide, kept, out)).view(x.shape)

    def fit(self, sample: Tensor, low: Tensor, high: Tensor) -> Params:
        """Static steps from a sample [tokens, in] and the extremes of every column [in] over all tokens."""
        return self.format.fit(torch.cat([sample.float(), low[None].float(), high[None].float()]))

    def fit_range(self, low: Tensor, high: Tensor) -> Params:
        """Static steps from a range alone (the moving average of batches): low and high [in]."""
        return replace(self.format, range=MinMax()).fit(torch.stack([low, high]).float())

    def bits_per_value(self, shape: tuple[int, ...]) -> float:
        """Bits of one input value as it is multiplied, its steps counted."""
        return self.format.bits_per_weight(shape)

    def __str__(self) -> str:
        when = "static" if self.static else "dynamic"
        kept = "" if self.outliers is None else f", columns from {self.outliers:g} on left out"
        return f"{self.format}, {when}{kept}"
