"""OCTAV: the clip with the least squared error, from the data alone, by a Newton recursion.

Sakr, Dai, Venkatesan, Zimmer, Dally, Khailany 2022, "Optimal Clipping and Magnitude-aware Differentiation
for Improved Quantization-aware Training", https://arxiv.org/abs/2206.06501. Rounding inside [-s, s] costs
c s^2 an element, clipping (|x| - s)^2; zeros are on the grid and cost nothing:

    J(s)    = c s^2 P(0 < |x| <= s) + E[(|x| - s)^2; |x| > s]
    s_{n+1} = E[|x|; |x| > s_n] / (c P(0 < |x| <= s_n) + P(|x| > s_n))

The paper has c = 4^-B / 3 for 2^B + 1 points on [-1, 1]; here c = gap^2 / 12 of the real grid. Grids that are
not uniform (FP4, NF4) get the c with which the recursion finds their best clip on a normal distribution.

Two things of the recursion are approximate: the density at s is dropped from J', and c s^2 is the noise of a
smooth density in narrow cells. At 2 bits that shifts the clip by up to 7 %. So secant steps on the true
derivative follow, read from a round trip q of the block through the grid (dq/ds = q / s):

    E'(s) / 2 = sum_i q_i (q_i - x_i) / s

and of all clips so visited the one with the least error stays. Road not taken: keeping the density term,
c s^2 p(s) / 2 with p(s) counted in a band around s. It serves a normal distribution (0.9 % off at 2 bits) and
fails Laplace (6.5 %), whose peak at 0 the noise model does not see either.

Shapes: blocks x [..., n]; y = |x| over its maximum, [N, n]; s, c [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.fit import Range
from fewbit.format.prior import SEGMENT, Frame, Prior, best_clip, clip_blocks, half_points


@dataclass(frozen=True, kw_only=True)
class OCTAV(Range):
    """The interval with the least mean squared error of each block, found in at most ``steps`` Newton steps.

    Symmetric formats clip about 0, affine ones about the mean, or at [0, s] where no element is negative;
    never beyond the data. ``refine`` round trips through the grid follow; 0 leaves the paper's fixed point.
    """

    scalar = True
    steps: int = 10
    refine: int = 3

    def __post_init__(self):
        if self.steps < 1 or self.refine < 0:
            raise InputError(
                f"OCTAV with {self.steps} steps and {self.refine} refinements is impossible; "
                "use at least 1 step (10 is usual) and 0 or more refinements (3 is usual)"
            )

    def __call__(self, x, fmt, importance):
        two_sided, half = fmt.unit_points(), half_points(fmt)
        constants = [noise_constant(p) for p in (two_sided, half)]
        starts = [_gaussian_clip(p) * math.sqrt(math.pi / 2) for p in (two_sided, half)]  # sigma over E|x|

        def clip(frame: Frame) -> Tensor:
            c, k = (torch.where(frame.one_sided, v[1], v[0]).double() for v in (constants, starts))
            s, curvature, _ = recursion(frame.magnitudes(frame.x), c, k, self.steps)
            return _refine(frame, s, curvature, self.refine)

        return clip_blocks(x, fmt, clip)


def recursion(y: Tensor, c: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """The paper's fixed point. y: [N, n] in [0, 1]; c, start: [N] -> (s [N], J''(s) n / 2 [N], steps taken).

    Begins at ``start`` times the mean of the non-zero y, at most at 0.9, where something is left above; if
    nothing lies above s, s becomes the largest, 1. All-zero blocks get 0.
    """
    total, nonzero = _tail(y, torch.zeros_like(c))
    s = (start * total / nonzero.clamp(min=1)).clamp(max=0.9)
    full = (nonzero > 0).double()
    move, rows = torch.zeros_like(s), torch.arange(len(s), device=s.device)
    found, curvature = torch.empty_like(s), torch.empty_like(s)
    for step in range(1, steps + 1):  # noqa: B007 (returned)
        excess, beyond = _tail(y, s)
        bend = c * (nonzero - beyond) + beyond
        last, move = move, torch.where(beyond > 0, (excess + s * beyond) / bend, full) - s
        # In a small block s can jump to and fro over one element: half a step back ends that.
        move = torch.where(move * last < 0, move / 2, move)
        s = s + move
        found[rows], curvature[rows] = s, bend
        moving = move.abs() > 1e-3 * s
        share = moving.double().mean()
        if not share:
            break
        if share < 0.5:  # go on with the blocks that have not settled
            y, c, nonzero, full, s, move, rows = (v[moving] for v in (y, c, nonzero, full, s, move, rows))
    return found, curvature, step


def _tail(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of (y - s) over y > s, and their number: [N] float64."""
    excess, beyond = torch.zeros_like(s), torch.zeros_like(s)
    level = s.to(y.dtype).unsqueeze(-1)
    for part in y.split(SEGMENT, -1):
        over = (part - level).clamp_(min=0)
        excess += over.sum(-1)
        beyond += over.sign_().sum(-1)  # a seventh of the time of count_nonzero on a CPU
    return excess, beyond


def _refine(frame: Frame, s: Tensor, curvature: Tensor, trials: int) -> Tensor:
    """The best of ``trials`` clips on the real grid, s first and then secant steps of at most s / 8; [N]."""
    best, least = s, torch.full_like(s, torch.inf)
    last = last_slope = s
    for trial in range(trials):
        slope, loss = _error(frame, s)
        best, least = torch.where(loss < least, s, best), torch.minimum(loss, least)
        if trial:
            secant = (slope - last_slope) / (s - last)
            curvature = torch.where(secant > 0, secant, curvature)
        last, last_slope = s, slope
        new = s - (slope / curvature).nan_to_num(0.0)
        s = new.clamp(s * 7 / 8, s * 9 / 8).clamp(max=1)
    return best


def _error(frame: Frame, s: Tensor) -> tuple[Tensor, Tensor]:
    """E'(s) / 2 and E(s) on the real grid, summed over the block: [N] float64."""
    lo, hi = frame.interval(s)
    slope, loss = torch.zeros_like(s), torch.zeros_like(s)
    for part in frame.x.split(SEGMENT, -1):
        q = frame.unit(frame.fmt.round_trip(part, lo, hi))
        error = q - frame.unit(part)
        slope += torch.linalg.vecdot(q, error)
        loss += torch.linalg.vecdot(error, error)
    return slope / s, loss


def _gaussian_clip(points: Tensor) -> float:
    return best_clip(points, Prior.GAUSS, bool(points[0] >= 0))


def noise_constant(points: Tensor) -> float:
    """c of points [k] on [-1, 1] or [0, 1]: rounding inside a clip at s costs c s^2 on average."""
    gaps = points.diff()
    if gaps.max() - gaps.min() < 1e-6 * gaps.max():
        return gaps[0].item() ** 2 / 12
    a, normal = _gaussian_clip(points), NormalDist()
    beyond = normal.cdf(-a)
    return (normal.pdf(a) - a * beyond) / (a * (0.5 - beyond))  # J'(a) = 0
