"""HQQ: move and stretch the grid of each block by closed-form steps on its error. Needs no data.

    min over z of  phi(W - W_r),   W_r = (Q(W) - z) s,   phi = |.|_p^p,  split by an auxiliary E:
    E  <-  shrink_p(W - W_r, beta),     shrink_p(x, beta) = sign(x) relu(|x| - |x|^(p - 1) / beta)
    z  <-  mean( Q(W) - (W - E) / s ),      beta <- kappa beta

Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog/. It is written here on the interval [lo, hi] that the grid of a block
covers: z moves by mean(W_r - (W - E)) / s exactly when lo and hi move by mean((W - E) - W_r). So nothing is
asked of the format but a round trip: any scalar grid and any offset is served, and every trial is judged as
it will be stored. What differs from the paper, and why:

- the first zero is rounded to a point of the grid; the published code does so at 4 bits alone. The search is
  local, so 0.0 stays near a point. That is most of why HQQ lost to rounding with integer zeros at 3 bits: a
  few input channels carry most of the input's energy (attention sinks), and in v_proj training has made
  their weights small. A grid that misses 0.0 is off by up to half a step there;
- sums over a block are weighted by column. In v_proj those weights are the smallest, in k_proj the largest:
  with m_j = mean_i w_ij^2 and r_j = m_j / mean(m), the weight is max(r_j, 1 / r_j)^columns;
- the interval is stretched too: (a, b) = argmin |(W - E) - (a W_r + b)|^2, then lo, hi <- a lo + b, a hi + b;
- each block keeps the best interval it met; the reference stops all blocks of a tensor together;
- residuals are measured in steps. In the unit of the weights the shrinkage never acts on a language model:
  p = 0.7 and beta = 10 leave all |residual| < 0.17 alone, ten times the size of a usual weight. Where it
  does act it costs accuracy, so norm = 2 (E = 0, least squares) is the default.

docs/methods/hqq.md has the figures.

Shapes: x, r, e [N, n]   blocks, their round trip, E      lo, hi [N]      a [N, n]   weights of the errors
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Format, QTensor, Range
from fewbit.format.fit import Target
from fewbit.solve.solver import Solver, Stats


@dataclass(frozen=True, kw_only=True)
class Hqq(Solver):
    """Half-quadratic refinement of the range that the format's own rule finds.

    norm: p of the error, (0, 2]; 2 is least squares, where E = 0; beta, kappa: the threshold of the shrinkage
    (below beta^(-1 / (2 - p)) steps a residual is left to the grid) and the growth of beta per iteration;
    iterations: at most so many moves of the interval; stretch: move the step as well as the zero; round_zero:
    start with 0.0 on a point of the grid, where it lies in the block's interval; columns: exponent of the
    weights made from the energies of W's columns, 0 for none. Where the calibration gathered diag(H), for a
    range rule that wants it, that is used in their place.
    """

    norm: float = 2.0
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    stretch: bool = True
    round_zero: bool = True
    columns: float = 1.5

    def __post_init__(self):
        if not (0 < self.norm <= 2 and self.beta > 0 and self.kappa >= 1):
            raise InputError(
                f"HQQ with norm {self.norm}, beta {self.beta}, kappa {self.kappa} is impossible; norm must "
                "be in (0, 2], beta positive and kappa at least 1"
            )
        if self.iterations < 0 or self.columns < 0:
            raise InputError(
                f"HQQ with {self.iterations} iterations and column exponent {self.columns} is impossible; "
                "both must be 0 or more"
            )

    @property
    def needs(self):
        return frozenset()

    def check(self, fmt):
        if fmt.scale is None or fmt.codebook or fmt.grid.width > 1:
            raise InputError(
                f"HQQ moves the ranges of blocks on scalar grids, which {fmt} is not; use a grid of width 1 "
                "with a scale"
            )

    def together(self, ws, stats, fmt):
        return [self._solve(w, stats, fmt) for w in ws]

    def _solve(self, w: Tensor, stats: Stats, fmt: Format) -> QTensor:
        importance = stats.importance if stats.importance is not None else column_weights(w, self.columns)
        params = replace(fmt, range=_Refined(start=fmt.range, how=self)).fit(w, importance)
        return fmt.encode(w, params)


def column_weights(w: Tensor, exponent: float) -> Tensor:
    """max(r_j, 1 / r_j)^exponent, r_j the energy of column j of ``w`` [out, in] over the mean one; [in].

    Ratios beyond 1000 count as 1000 (a dead column would take all the weight).
    """
    energy = w.square().mean(0)
    r = (energy / energy.mean().clamp(min=torch.finfo(w.dtype).tiny)).clamp(1e-3, 1e3)
    return torch.maximum(r, 1 / r) ** exponent


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """Generalised soft threshold, elementwise: sign(x) relu(|x| - |x|^(p - 1) / beta); 0 at 0."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class _Refined(Range):
    """The interval of ``start``, moved as ``how`` says."""

    start: Range
    how: Hqq

    def __call__(self, x, fmt, importance):
        lo, hi = self.start(x, fmt, importance)
        shape, n = lo.shape, x.shape[-1]
        x, lo, hi = x.reshape(-1, n), lo.reshape(-1), hi.reshape(-1)
        if fmt.symmetric:
            hi = torch.maximum(-lo, hi)
            lo = -hi
        elif self.how.round_zero:
            step = (hi - lo) / fmt.reach
            z = fmt.grid.min - lo / step  # the point of the grid's line that means 0.0
            shift = torch.where((lo < 0) & (hi > 0), (z - fmt.grid.snap(z)) * step, 0)
            lo, hi = lo + shift, hi + shift
        a = importance.expand(*shape, n).reshape(-1, n)
        chunk = max(1, (1 << 16 if x.device.type == "cpu" else 1 << 24) // n)  # what a CPU's cache holds
        parts = zip(x.split(chunk), lo.split(chunk), hi.split(chunk), a.split(chunk), strict=True)
        best = [refine(*part, fmt, self.how) for part in parts]
        lo, hi = (torch.cat(b).reshape(shape) for b in zip(*best, strict=True))
        return lo, hi


def refine(x: Tensor, lo: Tensor, hi: Tensor, a: Tensor, fmt: Target, how: Hqq) -> tuple[Tensor, Tensor]:
    """Intervals [N] of blocks ``x`` [N, n] after at most ``how.iterations`` moves; ``a`` [N, n] weigh errors.

    A block stops at its first move that does not lower its weighted error, and keeps the interval before it.
    """
    best_lo, best_hi = lo.clone(), hi.clone()
    least = x.new_full(lo.shape, torch.inf)
    moving = torch.arange(len(x), device=x.device)
    beta = how.beta
    for _ in range(how.iterations + 1):
        r = fmt.round_trip(x, lo, hi)
        e = x - r
        loss = (a * (e.square() if how.norm == 2 else e.abs().pow(how.norm))).sum(-1)
        better = loss < least[moving]
        keep = better.nonzero().squeeze(-1)
        if not len(keep):
            break
        moving = moving[keep]
        x, a, r, e, lo, hi = (v[keep] for v in (x, a, r, e, lo, hi))
        least[moving], best_lo[moving], best_hi[moving] = loss[keep], lo, hi
        if how.norm < 2:
            step = ((hi - lo) / fmt.reach / (2 if fmt.symmetric else 1)).unsqueeze(-1)
            e = e - step * shrink(e / step, how.norm, beta)  # W - E - W_r
            beta *= how.kappa
        stretch, shift = _fit(r, e, a, fmt.symmetric, how.stretch)
        lo, hi = lo + stretch * lo + shift, hi + stretch * hi + shift
    return best_lo, best_hi


def _fit(r: Tensor, d: Tensor, a: Tensor, symmetric: bool, stretches: bool) -> tuple[Tensor, Tensor]:
    """(g, b) [N] that minimise sum a (g r + b - d)^2; b = 0 on a symmetric grid, g = 0 without stretch."""
    total = a.sum(-1, keepdim=True)
    zero = torch.zeros_like(total)
    middle, wanted = (zero, zero) if symmetric else ((a * v).sum(-1, keepdim=True) / total for v in (r, d))
    g = zero
    if stretches:
        centred = r - middle
        spread = (a * centred.square()).sum(-1, keepdim=True)
        g = (a * centred * (d - wanted)).sum(-1, keepdim=True) / spread.clamp(min=1e-30)
        g = torch.where(spread > 0, g.clamp(min=-0.5), zero)  # an interval never turns around
    return g.squeeze(-1), (wanted - g * middle).squeeze(-1)
