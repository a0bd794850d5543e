"""Priors: the exact error of any grid under a Gaussian or Laplace distribution, and its best clip.

    E(a) = sum_i integral over cell i of (x - a u_i)^2 p(x) dx      cells: between midpoints of the a u_i

The integrals are partial moments of p and have closed forms, so E is exact for every grid u: narrow and full
integers, FP4, NF4, Lloyd-Max points. Papers minimise a model instead (clipping noise + Delta^2 / 12 over 2^M
bins), which no real grid obeys at 2 or 3 bits. The optimum scales with the distribution's one parameter, so
it is one number per grid: `best_clip`. `Gaussian` is the rule that follows when the data are known to be
normal (after a Hadamard transform): QuEST, Panferov et al. 2025, https://arxiv.org/abs/2502.05003.

Road not taken: minimising E itself by golden section. Its minimum is flat, which leaves half of float64's
digits; the root of E' keeps them.

Shapes: u [k] points of the grid on [-1, 1] (or [0, 1]), float64; blocks x [..., n]; a, lo, hi [...].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.fit import Range, Target

# Elements worked on at once: temporaries stay in the cache, and float32 sums of them exact to 1e-6.
SEGMENT = 1 << 17


class Prior(StrEnum):
    """A distribution about zero with its parameter at 1."""

    GAUSS = "gauss"  # sigma = 1
    LAPLACE = "laplace"  # b = E|x| = 1, so sigma = sqrt(2)


def partial_moments(x: Tensor, prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of p, t p and t^2 p from -infinity to x (any shape, float64, infinities allowed)."""
    finite = x.clamp(-1e3, 1e3)  # where p is 0 in float64
    if prior == Prior.GAUSS:
        p = torch.exp(-finite.square() / 2) / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(finite)
        return below, -p, below - finite * p
    r = finite.abs()
    p = torch.exp(-r) / 2
    below = torch.where(x < 0, p, 1 - p)
    second = (r.square() + 2 * r + 2) * p
    return below, -(1 + r) * p, torch.where(x < 0, second, 2 - second)


def _cells(points: Tensor, prior: Prior, one_sided: bool) -> list[Tensor]:
    """Mass, first and second moment of each point's cell: 3 x [k]."""
    end = points.new_tensor([math.inf])
    edges = torch.cat([-end, (points[1:] + points[:-1]) / 2, end])
    if one_sided:
        edges = edges.clamp(min=0)
    return [m.diff() * (2 if one_sided else 1) for m in partial_moments(edges, prior)]


def expected_error(points: Tensor, prior: Prior, one_sided: bool = False) -> float:
    """E[(x - nearest point)^2] for x ~ prior, exact. ``one_sided``: for |x|, whose density is 2p on x > 0.

    points: [k] ascending.
    """
    u = points.double()
    mass, first, second = _cells(u, prior, one_sided)
    return (second - 2 * u * first + u.square() * mass).sum().item()


def best_clip(points: Tensor, prior: Prior, one_sided: bool = False) -> float:
    """The factor a > 0 with the least ``expected_error(a * points)``, to 1e-9 relative; remembered.

    points: [k] ascending, of magnitude about 1. Raises ``InputError`` when all of them are 0.
    """
    return _best_clip(tuple(points.tolist()), prior, one_sided)


@functools.lru_cache(maxsize=512)
def _best_clip(values: tuple[float, ...], prior: Prior, one_sided: bool) -> float:
    u = torch.tensor(values, dtype=torch.float64, device="cpu")
    if not u.any():
        raise InputError("a grid whose only point is 0 has no best clip; use a grid with at least two points")

    def slope(a: float) -> float:  # E'(a) / 2; the cells' borders move too, but E does not jump there
        mass, first, _ = _cells(a * u, prior, one_sided)
        return (u * (a * u * mass - first)).sum().item()

    # Floating grids ripple by octaves, so look at all of them first. Beyond 64 nothing is left to clip.
    trials = [2 ** (i / 8) for i in range(-24, 49)]
    errors = [expected_error(a * u, prior, one_sided) for a in trials]
    i = min(range(1, len(trials) - 1), key=errors.__getitem__)
    low, high = trials[i - 1], trials[i + 1]
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


def half_points(fmt: Target) -> Tensor:
    """The points of ``fmt`` in units of s on the interval [0, s] of non-negative data, [k] float64."""
    return fmt.unit_points() if fmt.symmetric else (fmt.unit_points() + 1) / 2


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Blocks x [N, n] seen from their centre, in units of their largest magnitude: what clip rules work in.

    centre, top, low, high: [N]; one_sided: [N], True where the interval is [0, s]. Symmetric formats have
    centre 0, affine ones the mean, or 0 where no element is negative (after a ReLU).
    """

    x: Tensor
    centre: Tensor
    top: Tensor
    low: Tensor
    high: Tensor
    one_sided: Tensor
    fmt: Target

    @staticmethod
    def of(x: Tensor, fmt: Target) -> Frame:
        """The frame of blocks x [N, n], float32 or float64."""
        low, high = x.amin(-1), x.amax(-1)  # twenty times as fast as aminmax along an axis on a CPU
        if fmt.symmetric:
            one_sided = torch.full_like(low, fmt.grid.min >= 0, dtype=torch.bool)
            centre = torch.zeros_like(low)
            top = high if fmt.grid.min >= 0 else torch.maximum(-low, high)
        else:
            one_sided = low >= 0
            centre = torch.where(one_sided, 0, x.mean(-1))
            top = torch.maximum(high - centre, centre - low)
        top = top.clamp(min=torch.finfo(x.dtype).tiny)  # its inverse is finite
        return Frame(x=x, centre=centre, top=top, low=low, high=high, one_sided=one_sided, fmt=fmt)

    def unit(self, part: Tensor) -> Tensor:
        """(x - centre) / top for some columns of x; a new tensor."""
        part = part if self.fmt.symmetric else part - self.centre.unsqueeze(-1)
        return part * self.top.reciprocal().unsqueeze(-1)

    def magnitudes(self, part: Tensor) -> Tensor:
        """|unit(part)| in [0, 1]; 0 for negative elements where the grid has no negative point."""
        z = self.unit(part)
        return z.clamp_(min=0) if self.fmt.symmetric and self.fmt.grid.min >= 0 else z.abs_()

    def interval(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Clips s [N] in units of ``top`` -> (lo, hi) [N], never beyond the data."""
        a = s.to(self.x.dtype) * self.top
        if self.fmt.symmetric:
            most = self.high.clamp(min=0) if self.fmt.grid.min >= 0 else torch.maximum(-self.low, self.high)
            a = torch.minimum(a, most)
            return -a, a
        return torch.maximum(self.low, self.centre - a), torch.minimum(self.high, self.centre + a)


def clip_blocks(x: Tensor, fmt: Target, clip: Callable[[Frame], Tensor]) -> tuple[Tensor, Tensor]:
    """Intervals (lo, hi) [...] of blocks x [..., n] from a rule Frame -> s [N], a cacheful at a time."""
    shape, n = x.shape[:-1], x.shape[-1]
    rows = (x if x.dtype == torch.float64 else x.float()).reshape(-1, n)
    ends = rows.new_empty(2, len(rows))
    chunk = max(1, (SEGMENT if x.device.type == "cpu" else 1 << 24) // n)
    for start in range(0, len(rows), chunk):
        frame = Frame.of(rows[start : start + chunk], fmt)
        lo, hi = frame.interval(clip(frame))
        ends[0, start : start + chunk], ends[1, start : start + chunk] = lo, hi
    return ends[0].reshape(shape), ends[1].reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Range):
    """The interval that is best on average if each block is normal: rms(x) times one number of the grid.

    Formats with a zero take the standard deviation, about the mean. Vector grids hold points for unit
    variance, so there the step is the rms itself. The interval may exceed the data: it is the prior's.

    rho: the interval, and with it the step, is divided by it: above 1 finer steps, below 1 less clipping.
    QuIP#'s lattice takes 1.03, .98 and 1.03 at 2, 3 and 4 bits, or 0.9 where errors are fed forward; least
    on normal data at 4 bits is 0.93 (benchmarks/gaussian.py).
    """

    rho: float = 1.0

    def __post_init__(self):
        if not 0 < self.rho < math.inf:
            raise InputError(f"rho {self.rho} cannot divide a step; give a positive number, such as 0.9")

    def __call__(self, x, fmt, importance):
        x = x if x.dtype == torch.float64 else x.float()
        centre = torch.zeros_like(x[..., 0]) if fmt.symmetric else x.mean(-1)
        z = x if fmt.symmetric else x - centre.unsqueeze(-1)
        rms = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64) / (math.sqrt(x.shape[-1]) * self.rho)
        if fmt.grid.width > 1:
            low, high = (-fmt.reach, fmt.reach) if fmt.symmetric else (fmt.grid.min, fmt.grid.max)
        else:
            high = best_clip(fmt.unit_points(), Prior.GAUSS)
            low = -high
        rms = rms.to(x.dtype)
        return centre + low * rms, centre + high * rms
