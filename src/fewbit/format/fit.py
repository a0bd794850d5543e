"""Ways to choose a range: a pure function from the values of each block to the interval the grid must cover.

A range rule returns ``(lo, hi)`` per block; ``Format`` turns the interval into scale and zero, rounds the
scale to its own storage and only then computes the zero and the codes. So a rule knows nothing of bits, and
each serves every grid. The one exception by nature is ``MSE``, which tries shrunken intervals on the real
grid.

Sources: min-max and p-norm grid: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (reference quantizer:
100 steps, |error|^2.4); percentile: Wu et al. 2020, https://arxiv.org/abs/2004.09602.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError

# What MSE needs of a Format: (blocks [N, n], lo [N], hi [N]) -> blocks after a round trip through the grid.
RoundTrip = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Range(ABC):
    """A rule that chooses the interval of each block."""

    @property
    def wants_importance(self) -> bool:
        """True when the rule can use the mean squared input of each column, diag(H)."""
        return False

    @abstractmethod
    def __call__(self, x: Tensor, round_trip: RoundTrip, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Blocks ``x`` [..., n] float -> (lo [...], hi [...]).

        ``round_trip`` maps blocks and an interval to their quantized values. ``importance`` broadcasts to
        ``x`` and is the weight of each element's error, or None.
        """


@dataclass(frozen=True, kw_only=True)
class AbsMax(Range):
    """The symmetric interval [-max|x|, max|x|]."""

    def __call__(self, x, round_trip, importance):
        a = x.abs().amax(-1)
        return -a, a


@dataclass(frozen=True, kw_only=True)
class MinMax(Range):
    """The interval [min x, max x]."""

    def __call__(self, x, round_trip, importance):
        lo, hi = torch.aminmax(x, dim=-1)
        return lo, hi


@dataclass(frozen=True, kw_only=True)
class Percentile(Range):
    """The interval between the (100 - q)-th and the q-th percentile of each block; 100 is ``MinMax``."""

    q: float = 99.9

    def __post_init__(self):
        if not 50 < self.q <= 100:
            raise InputError(f"percentile {self.q} is outside (50, 100]; 99.9 is usual")

    def __call__(self, x, round_trip, importance):
        # kthvalue and not quantile: quantile refuses more than 2**24 elements and interpolates.
        n = x.shape[-1]
        k = min(n, max(1, round(self.q / 100 * n)))
        return x.kthvalue(n + 1 - k, -1).values, x.kthvalue(k, -1).values


@dataclass(frozen=True, kw_only=True)
class MSE(Range):
    """The shrunken min-max interval with the least sum of |Q(x) - x|^norm over the block.

    ``steps`` intervals between 1 and ``shrink`` times the block's own are tried on the real grid with the
    scale as it will be stored, then four more between the best and its neighbours. With ``weighted``, each
    element's error counts with the mean squared input of its column, diag(H): the error of the layer's output
    when inputs are uncorrelated.
    """

    norm: float = 2.0
    steps: int = 12
    shrink: float = 0.4
    weighted: bool = True

    def __post_init__(self):
        if not (self.norm > 0 and self.steps >= 1 and 0 < self.shrink <= 1):
            raise InputError(
                f"MSE range search with norm {self.norm}, {self.steps} steps down to {self.shrink} is "
                "impossible; "
                "norm must be positive, steps at least 1 and shrink in (0, 1]"
            )

    @property
    def wants_importance(self):
        return self.weighted

    def __call__(self, x, round_trip, importance):
        shape, n = x.shape[:-1], x.shape[-1]
        rows = x.reshape(-1, n)
        weights = None
        if self.weighted and importance is not None:
            weights = importance.expand_as(x).reshape(-1, n)
        lo, hi = torch.aminmax(rows, dim=-1)
        best_lo, best_hi = lo.clone(), hi.clone()
        # The search reads each element a hundred times: chunks that a CPU's second-level cache holds, and on
        # a GPU chunks that are worth their launches.
        chunk = max(1, (1 << 16 if x.device.type == "cpu" else 1 << 24) // n)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            lo_p, hi_p = self._search(
                rows[part], lo[part], hi[part], round_trip, None if weights is None else weights[part]
            )
            best_lo[part], best_hi[part] = lo_p, hi_p
        return best_lo.reshape(shape), best_hi.reshape(shape)

    def _search(self, x: Tensor, lo: Tensor, hi: Tensor, round_trip: RoundTrip, weights: Tensor | None):
        """Best interval of each block: x [N, n], lo and hi [N], weights [N, n] or None."""
        least = torch.full_like(lo, torch.inf)
        best = torch.ones_like(lo)

        def attempt(p: Tensor) -> None:  # shrink factors, one per block
            nonlocal least, best
            error = round_trip(x, p * lo, p * hi).sub_(x)
            error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
            loss = error.sum(-1) if weights is None else torch.einsum("bn,bn->b", error, weights)
            better = loss < least
            least, best = torch.where(better, loss, least), torch.where(better, p, best)

        for p in torch.linspace(1.0, self.shrink, self.steps).tolist():
            attempt(torch.full_like(lo, p))
        coarse, gap = best, (1 - self.shrink) / max(1, self.steps - 1)
        for part in (-2 / 3, -1 / 3, 1 / 3, 2 / 3):
            attempt((coarse + part * gap).clamp(max=1.0))
        return best * lo, best * hi


RANGES = (AbsMax, MinMax, Percentile, MSE)
