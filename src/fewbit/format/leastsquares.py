"""Least squares: step and offset of a block refitted to the codes that they gave.

    trial d:   step = spread / (L + d)         L steps between the block's ends, its lower end kept
    refit:     min over k, c of sum_i w_i (x_i - k y_i - c)^2        y = the block as it was rounded

Rounding with a step and then solving for the step that these codes want, in turn, is the two-variable case of
k-means (Lloyd 1982, "Least squares quantization in PCM", https://doi.org/10.1109/TIT.1982.1056489): neither
half makes the error larger, but both stop at the next valley, so a few steps around the block's own are
tried. Regressing on y instead of the codes needs nothing of the grid: an interval [lo, hi] becomes
[k lo + c, k hi + c]. Symmetric formats have c = 0. Every trial is judged on the real grid, steps as they will
be stored where they are plain floats.

llama.cpp searches its K-quants so as well ("make_qkx2_quants"); on normal data this rule ends 2 to 20 % below
its error, weighted or not (tests/io/test_gguf_search.py).

Road not taken: shrinking the interval about its middle (`MSE`). It moves both ends at once and leaves 10 to
13 % more at 4 to 6 bits in blocks of 16 and 32.

Shapes: blocks x [..., n]; w as x; lo, hi [...].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.fit import Range, Target

TRIALS, ROUNDS = 16, 3
_CHUNK = 1 << 17  # elements worked on at once
_FINER = 1.5  # steps fewer than the grid has between the block's ends, in the first trial


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Range):
    """The interval with the least squared error of `TRIALS`, each refitted `ROUNDS` times.

    The coarsest trial has ``span`` steps more over the block than there are points; wide blocks, in which a
    few elements stand out, want more than small ones (8 for rows). With ``weighted``, each element's error
    counts with the mean squared input of its column.
    """

    span: float = 2.5
    weighted: bool = True

    def __post_init__(self):
        if not self.span >= 0:
            raise InputError(f"a span of {self.span} steps is none; give 0 or more, such as 2.5")

    @property
    def wants_importance(self):
        return self.weighted

    def __call__(self, x, fmt, importance):
        w = importance.expand_as(x) if self.weighted and importance is not None else torch.ones_like(x)
        n, shape = x.shape[-1], x.shape[:-1]
        parts = [v.reshape(-1, n).split(max(1, _CHUNK // n)) for v in (x, w)]
        found = [self._best(*part, fmt) for part in zip(*parts, strict=True)]
        return tuple(torch.cat(ends).reshape(shape) for ends in zip(*found, strict=True))

    def _best(self, x: Tensor, w: Tensor, fmt: Target) -> tuple[Tensor, Tensor]:
        low, high = best = torch.aminmax(x, dim=-1)
        least, total = torch.full_like(low, torch.inf), w.sum(-1).clamp(min=1e-30)
        steps = max(3.0, (2**fmt.grid.bits - 1) / (2 if fmt.symmetric else 1))
        for d in torch.linspace(-_FINER, self.span, TRIALS).tolist():
            p = steps / (steps + d)
            lo, hi = (p * low, p * high) if fmt.symmetric else (low, low + p * (high - low))
            for _ in range(ROUNDS + 1):
                y = fmt.round_trip(x, lo, hi)
                loss = (w * (x - y).square()).sum(-1)
                best = tuple(torch.where(loss < least, a, b) for a, b in zip((lo, hi), best, strict=True))
                least = torch.minimum(loss, least)
                mean_x, mean_y = (0 if fmt.symmetric else (w * v).sum(-1) / total for v in (x, y))
                v = w * (y if fmt.symmetric else y - mean_y.unsqueeze(-1))
                k = (v * x).sum(-1) / (v * y).sum(-1).clamp(min=1e-30)
                lo, hi = k * lo + (mean_x - k * mean_y), k * hi + (mean_x - k * mean_y)
        return best
