"""Split: the columns of a weight that meet outliers in another format, all others in the main one.

    O = { j : |x_tj| >= threshold for at least a share of the calibration tokens t }
    x W^T = sum_{j not in O} x_tj w_oj  +  sum_{j in O} x_tj w_oj
            quantized, fitted without O    x as it is, w a plain float

LLM.int8(), Dettmers, Lewis, Belkada, Zettlemoyer 2022, https://arxiv.org/abs/2208.07339, section 3.2, eq. 8,
with O fixed by calibration where the paper finds it anew at every call and therefore keeps all of W in 16
bits. The share leaves out columns that are large at single tokens only: a token has a step of its own, and in
late layers the largest ones lift nearly every hidden channel of the feed-forward network. (The paper speaks
of an outlier feature from 6 % of the tokens on.) Any format, solver and quantized input may stand on the
other side.

The road not taken: a main weight with fewer columns. A gap costs its codes (0.5 % of them for 3 in 576), and
spares a gather of x at every call; blocks tile as they did.

Shapes: W [out, in], x [tokens, in], k = |O|.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.affine import NATIVE
from fewbit.format.format import Format, Zero
from fewbit.format.named import BF16
from fewbit.format.qtensor import QTensor
from fewbit.format.stats import Stats


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How many columns of a weight are kept apart, in which float format."""

    columns: int
    format: Format = BF16

    def layout(self, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of what is stored: the columns' values [out, k], their places [k]."""
        dtype = NATIVE[self.format.grid.name]
        return {"apart": ((rows, self.columns), dtype), "apart_columns": ((self.columns,), torch.int32)}

    def bits(self, rows: int) -> int:
        """Stored bits."""
        return sum(math.prod(s) * t.itemsize * 8 for s, t in self.layout(rows).values())


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitTensor:
    """A weight [out, in] in two formats.

    rest: all columns, exactly 0 in those apart; apart: float [out, k]; columns: their places [k] int64,
    ascending.
    """

    rest: QTensor
    apart: Tensor
    columns: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.rest.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that both parts mean, [out, in] in ``dtype``."""
        return self.rest.dequantize(dtype).index_copy(1, self.columns, self.apart.to(dtype))

    @property
    def nbytes(self) -> float:
        """Bytes of everything stored: codes and steps of all columns, floats and places of those apart."""
        return self.rest.nbytes + self.apart.nbytes + 4 * len(self.columns)

    @property
    def bits_per_weight(self) -> float:
        """The same in bits per element."""
        return 8 * self.nbytes / math.prod(self.shape)

    def rows(self, start: int, stop: int) -> SplitTensor:
        """Rows ``start`` to ``stop``, as of a QTensor."""
        return replace(self, rest=self.rest.rows(start, stop), apart=self.apart[start:stop])

    def to(self, device: torch.device | str) -> SplitTensor:
        """The same on another device."""
        parts = (self.rest, self.apart, self.columns)
        rest, apart, columns = (p.to(device) for p in parts)
        return SplitTensor(rest=rest, apart=apart, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Columns whose input reaches ``threshold`` at a ``share`` of the calibration tokens are kept in
    ``apart``: BF16, FP16 or FP32.
    """

    threshold: float = 6.0
    share: float = 0.01
    apart: Format = BF16

    def __post_init__(self):
        if not (self.threshold > 0 and 0 < self.share <= 1):
            raise InputError(
                f"a split at {self.threshold} for a share {self.share} of the tokens is none; take a "
                "threshold above 0 (the paper's is 6.0) and a share in (0, 1]"
            )
        if self.apart.scale is not None or self.apart.grid.name not in NATIVE:
            raise InputError(
                f"columns apart are kept as plain floats, BF16, FP16 or FP32, got {self.apart}; quantize "
                "them by leaving the split out"
            )

    def check(self, fmt: Format) -> None:
        """Raise ``InputError`` for a main format that has no exact 0, the value of columns apart in it."""
        zero = fmt.grid.value(fmt.grid.round(torch.zeros(fmt.grid.width)))
        if fmt.zero not in (Zero.NONE, Zero.INTEGER) or zero.any():
            raise InputError(
                f"{fmt} holds no exact 0, which columns kept apart leave behind; use an integer zero or none"
            )

    def pick(self, stats: Stats) -> Tensor:
        """O [k] int64, ascending; empty where no inputs were seen."""
        if stats.sample is None:
            return torch.empty(0, dtype=torch.int64)
        often = (stats.sample.abs() >= self.threshold).float().mean(0) >= self.share
        return often.nonzero().flatten()

    def __call__(
        self, w: Tensor, stats: Stats, solve: Callable[[Tensor, Stats], QTensor]
    ) -> QTensor | SplitTensor:
        """Quantize ``w`` [out, in]: ``solve(w, stats)`` chooses the codes of the columns not in O."""
        columns = self.pick(stats)
        if not len(columns):
            return solve(w, stats)
        apart = w[:, columns].to(NATIVE[self.apart.grid.name])
        rest = solve(w.index_fill(1, columns, 0), without(stats, columns))
        return SplitTensor(rest=rest, apart=apart, columns=columns)


def without(stats: Stats, columns: Tensor) -> Stats:
    """The statistics of inputs that are 0 in ``columns`` [k]."""
    zero = lambda v, dim: None if v is None else v.index_fill(dim, columns, 0)  # noqa: E731
    return replace(
        stats,
        gram=zero(zero(stats.gram, 0), 1),
        mean_abs=zero(stats.mean_abs, 0),
        low=zero(stats.low, 0),
        high=zero(stats.high, 0),
        sample=zero(stats.sample, 1),
    )
