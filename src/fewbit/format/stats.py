"""What calibration measured of the inputs x [tokens, in] of layers that read one tensor.

Solvers, range rules and the choosers of transforms read it; each says which parts it needs (`Need`), and the
loop gathers those and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor


class Need(StrEnum):
    """A statistic of the inputs of a layer."""

    GRAM = "gram"  # products of columns: [in, in]
    CROSS = "cross"  # products of what rounding takes from columns with what it leaves: [in, in]
    MEAN = "mean"  # mean of each column: [in]
    COLUMNS = "columns"  # mean and largest magnitude, least and largest value of each column: [in]
    SAMPLE = "sample"  # some of the rows
    BLOCK = "block"  # none: the calls of the whole block, which a tuner runs itself


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Calibration statistics, float32; None where nothing asked for them.

    gram: H = X^T X / tokens [in, in]; cross: K = (X - R)^T R / tokens [in, in], R the inputs X as the layers
    read them, rounded (None where they are not); then gram is of R. mean [in] bfloat16: of the first batch of
    calibration, what centred inputs take off. mean_abs, low, high [in]: mean |x|, min x and max x of each
    column; sample [rows, in]: evenly chosen tokens; batches [batches, 2]: least and largest
    value of each; tokens: how many rows were seen.
    """

    gram: Tensor | None = None
    cross: Tensor | None = None
    mean: Tensor | None = None
    mean_abs: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    sample: Tensor | None = None
    batches: Tensor | None = None
    tokens: int = 0

    @property
    def importance(self) -> Tensor | None:
        """Mean squared input of each column, diag(H) [in]."""
        return None if self.gram is None else self.gram.diagonal()

    @property
    def abs_max(self) -> Tensor | None:
        """Largest magnitude of each column [in]."""
        return None if self.high is None else self.high.maximum(-self.low)

    def mapped(self, apply: Callable[..., Tensor]) -> Stats:
        """The statistics of x T, ``apply(x, axis)`` = x T along an axis; those of single columns are lost."""
        gram = None if self.gram is None else apply(apply(self.gram, -2), -1)
        sample = None if self.sample is None else apply(self.sample, -1)
        return replace(self, gram=gram, sample=sample, mean_abs=None, low=None, high=None)

    def divided(self, s: Tensor) -> Stats:
        """The statistics of x / s, s [in] positive."""
        over = lambda v: None if v is None else v / s  # noqa: E731
        both = lambda v: None if v is None else v / s / s[:, None]  # noqa: E731
        columns = {name: over(getattr(self, name)) for name in ("mean", "mean_abs", "low", "high")}
        return replace(self, gram=both(self.gram), cross=both(self.cross), **columns)
