"""How the input of a layer is quantized before the product.

    dynamic   steps of x [..., tokens, in] are fitted at every call (per token, or one for the call)
    static    steps were fitted on calibration inputs and are stored: per tensor, or per group of columns;
              of steps in two levels (NVFP4) the outer one alone, and the inner ones are found at every call
    groups    "per embedding group": columns sorted by their range max - min are cut into K equal groups with
              one step each (Bondarenko, Nagel, Blankevoort 2021, https://arxiv.org/abs/2109.12948, section 4)
    outliers  columns in which any |x| of the call reaches the threshold skip the rounding (LLM.int8():
              Dettmers, Lewis, Belkada, Zettlemoyer 2022, https://arxiv.org/abs/2208.07339, section 3.2), and
              the steps are fitted without them
    centred   x ~ c + Q(x - c), c [in] the mean of each column over calibration inputs, which is stored; W c
              is a constant of the layer. Where means hold half of the energy, so they do of the error:
              channel-wise shifting (Outlier Suppression+: Wei et al. 2023, https://arxiv.org/abs/2304.09145)

Steps of static ranges: the format's range rule on a sample of calibration tokens that always contains the
extremes of every column (min-max, percentile, MSE, ACIQ, OCTAV), or with ``momentum`` the moving average
m * old + (1 - m) * new of the range of each batch (Quanto, 0.9).

A step per group is stored for every column of it: so x needs no gather, and no permutation is stored.
Columns of which the calibration already knows can be kept apart in the weight, too: ``fewbit.format.split``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import raw_step
from fewbit.format.block import Channel, Columns, Group, PerTensor, Token
from fewbit.format.fit import MinMax
from fewbit.format.format import Format, Params


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The Format of a layer's input, when its steps are fitted, which columns share one, and which are left
    out.
    """

    format: Format
    static: bool = False
    momentum: float | None = None
    outliers: float | None = None
    groups: int | None = None
    centred: bool = False

    def __post_init__(self):
        own = self.format
        if own.scale is None or own.grid.width > 1 or own.codebook is not None:
            raise InputError(f"activations need a scalar format with steps, got {own}")
        if self.static and not (self.local or isinstance(own.block, PerTensor | Columns)):
            raise InputError(f"static steps cannot follow tokens; use PerTensor or Columns, not {own.block}")
        if not self.static and not isinstance(own.block, PerTensor | Token | Channel | Group | Columns):
            raise InputError(f"dynamic steps are per tensor, token, group or column, got {own.block}")
        if self.momentum is not None and not (self.static and 0 <= self.momentum < 1 and not self.local):
            raise InputError(f"momentum {self.momentum} needs static steps in one level, and to be in [0, 1)")
        if self.outliers is not None and not (self.outliers > 0 and not self.static):
            raise InputError(f"outlier threshold {self.outliers} needs dynamic steps and must be positive")
        sortable = self.static and own.block == Columns(1) and self.momentum is None
        if self.groups is not None and not (sortable and self.groups >= 1):
            need = "need 1 or more, static steps of Columns(1) and no momentum"
            raise InputError(f"{self.groups} groups of columns sorted by range {need}, got {own}")
        if self.centred and (self.static or self.outliers is not None):
            raise InputError(f"centred inputs need dynamic steps and no outlier threshold, got {self}")

    @property
    def local(self) -> bool:
        """True where a stored step per tensor is the unit of symmetric steps that are found at every call."""
        own, whole = self.format, PerTensor()
        return self.static and own.scale.scale is not None and own.scale.block == whole and not own.zero_bits

    def __call__(self, x: Tensor, params: Params | None = None, apart: Tensor | None = None) -> Tensor:
        """x [..., in] through the grid and back, in x's dtype.

        params: stored steps of a static one, means of a centred one; apart: columns [k] int64 that stay as
        they are.
        """
        if x.numel() == 0:
            return x
        rows = x.reshape(-1, x.shape[-1])
        if self.centred:
            if params is None:
                raise InputError(f"{self} takes off the means of its columns, which calibration has to find")
            c = params.zero.float()
            return (c + replace(self, centred=False)(rows.float() - c, apart=apart)).to(x.dtype).view(x.shape)
        wide = None if self.outliers is None else rows.abs().amax(0) >= self.outliers
        if apart is not None:
            wide = rows.new_zeros(rows.shape[-1], dtype=torch.bool) if wide is None else wide
            wide = wide.index_fill(0, apart, True)
        if wide is not None:
            kept, rows = rows, rows.masked_fill(wide, 0)
        rows = rows.float()
        params = self._inner(rows, params.scale) if params is not None and self.local else params
        q = self.format.quantize(rows) if params is None else self.format.encode(rows, params)
        out = q.dequantize(x.dtype)
        return (out if wide is None else torch.where(wide, kept, out)).view(x.shape)

    def _inner(self, x: Tensor, outer: Tensor) -> Params:
        """Steps of this call in units of the stored one; those beyond the largest code saturate."""
        own = self.format
        raw = raw_step(own, *own.range(own.block.split(x), own, None)).maximum(own.scale.grid.least * outer)
        return Params(scale=own.scale.encode(raw, Params(scale=outer, zero=None)), zero=None)

    @staticmethod
    def center(rows: Tensor) -> Params:
        """The means [in] of calibration inputs [tokens, in], as a centred input stores them: bfloat16."""
        return Params(scale=None, zero=rows.float().mean(0).bfloat16())

    def fit(self, sample: Tensor, low: Tensor, high: Tensor) -> Params:
        """Static steps from a sample [tokens, in] and the extremes of every column [in] over all tokens."""
        rows = torch.cat([sample.float(), low[None].float(), high[None].float()])
        if self.groups is None:
            found = self.format.fit(rows)
            return Params(scale=found.scale.scale, zero=None) if self.local else found
        order = (high - low).argsort(stable=True)
        size, rest = divmod(len(order), self.groups)
        parts = []  # the first ``rest`` groups hold one column more
        for n, columns in ((size + 1, order[: rest * (size + 1)]), (size, order[rest * (size + 1) :])):
            if len(columns):
                p = replace(self.format, block=Columns(n)).fit(rows[:, columns])
                parts.append([None if v is None else v.repeat_interleave(n) for v in (p.scale, p.zero)])
        back = order.argsort()
        scale, zero = (None if v[0] is None else torch.cat(v)[back] for v in zip(*parts, strict=True))
        return Params(scale=scale, zero=zero)

    def fit_range(self, low: Tensor, high: Tensor) -> Params:
        """Static steps from a range alone (the moving average of batches): low and high [in]."""
        return replace(self.format, range=MinMax()).fit(torch.stack([low, high]).float())

    def bits_per_value(self, shape: tuple[int, ...]) -> float:
        """Bits of one input value as it is multiplied, its steps counted."""
        return self.format.bits_per_weight(shape)

    def __str__(self) -> str:
        when = "static" if self.static else "dynamic"
        kept = "" if self.outliers is None else f", columns from {self.outliers:g} on left out"
        groups = "" if self.groups is None else f", {self.groups} groups by range"
        return f"{self.format}, {when}{groups}{kept}{', centred' if self.centred else ''}"
