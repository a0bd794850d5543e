"""How large the rounding error of a format is on known distributions: measured, expected and bounded.

Every distribution has mean 0 and variance 1, so a mean squared error D is also the relative one, and
-10 log10 D is the signal-to-noise ratio in dB.

*Expected*: for points p_1 < ... < p_k at step s, cell by cell between the midpoints,

    D = sum_i  integral over cell i of (x - s p_i)^2 f(x) dx  =  sum_i  M2 - 2 s p_i M1 + (s p_i)^2 M0

with the partial moments M_j of the density f in closed form (`partial_moments`). A block of n elements whose
step depends on m = max|x| alone is integrated over m, whose distribution function is (2 F(m) - 1)^n: the
other n - 1 elements follow f restricted to [-m, m], and the element m itself has an error of its own.

Optimal points: Max 1960, https://doi.org/10.1109/TIT.1960.1057548. Bounds and samples: `distribution`.

Shapes: p [k] points, m [b] largest magnitudes, x [n] or [rows, columns] samples.

Road not taken: one search for block formats' best step. A block format chooses its own steps, which is what
it is; only a grid alone is given the best single step.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from fewbit.analyze.distribution import (
    SIDE,
    Distribution,
    lower_bound,
    partial_moments,
    quantile,
    random_samples,
    strata,
    weighted_vectors,
)
from fewbit.errors import InputError
from fewbit.format import AbsMax, Flat, Format, Group, Zero, value_of
from fewbit.format.fit import PowerOfTwo
from fewbit.grid.grid import Grid
from fewbit.grid.integer import Int


class View(StrEnum):
    """How a grid meets data that are symmetric about 0."""

    SIGNED = "as it is"
    CENTRED = "with an offset in the middle of its range"  # unsigned integers
    MAGNITUDE = "on |x|"  # formats of scales, which have no sign


# -- expected errors


def expected_error(points: np.ndarray, law: Distribution, limit: np.ndarray | None = None) -> np.ndarray:
    """Mean squared error of rounding to the nearest of ``points`` [..., k], ascending along k: [...] float64.

    ``limit`` [...]: the density restricted to [-limit, limit].
    """
    points = np.asarray(points, dtype=np.float64)
    ends = np.full(points.shape[:-1], np.inf) if limit is None else np.asarray(limit, dtype=np.float64)
    middle = (points[..., 1:] + points[..., :-1]) / 2
    cuts = np.concatenate([-ends[..., None], middle, ends[..., None]], -1)
    cuts = np.clip(cuts, -ends[..., None], ends[..., None])
    m0, m1, m2 = (np.diff(m, axis=-1) for m in partial_moments(law, cuts))
    total = (m2 - 2 * points * m1 + points**2 * m0).sum(-1)
    return total / m0.sum(-1)


def view_of(grid: Grid) -> View:
    """The way to measure this grid on symmetric data."""
    if grid.width > 1 or grid.min < 0:
        return View.SIGNED
    return View.CENTRED if isinstance(grid, Int) else View.MAGNITUDE


def points_of(grid: Grid) -> np.ndarray:
    """The points [k] that symmetric data meet: distinct, finite, ascending; mirrored for View.MAGNITUDE."""
    if grid.width > 1:
        raise InputError(
            f"{grid.name} has points of {grid.width} coordinates; expected errors are for scalar grids"
        )
    values = grid.value(grid.codes(), torch.float64)
    values = values[values.isfinite()].numpy()
    if view_of(grid) is View.CENTRED:
        values = values - (grid.max + grid.min) / 2
    if view_of(grid) is View.MAGNITUDE:
        values = np.concatenate([-values, values])
    return np.unique(values)


def _least(loss, low: float, high: float, tries: int = 241, rounds: int = 5) -> tuple[float, float]:
    """Step and loss at the least ``loss(steps [s]) -> [s]`` between the steps ``low`` and ``high``.

    A float's error has a minimum in every octave, so all are looked at before the best is refined.
    """
    octaves = np.linspace(math.log2(low), math.log2(high), tries)
    best = octaves[np.argmin(loss(np.exp2(octaves)))]
    width = octaves[1] - octaves[0]
    for _ in range(rounds):
        near = np.linspace(best - width, best + width, 9)
        losses = loss(np.exp2(near))
        best, width = near[np.argmin(losses)], width / 4
    return float(np.exp2(best)), float(losses.min())


def best_expected(grid: Grid, law: Distribution) -> tuple[float, float]:
    """Best step of a scalar grid for data of this distribution, and the expected error there."""
    points = points_of(grid)
    reach = np.abs(points).max()
    return _least(lambda steps: expected_error(steps[:, None] * points, law), 0.3 / reach, 300 / reach)


def expected_block_error(fmt: Format, law: Distribution, total: int = SIDE**2) -> float | None:
    """Expected error of a format whose steps follow from max|x| of each block; None for any other.

    ``total``: elements of the tensor, whose largest is taken to be the quantile of 1 / (2 total) (what a step
    for the whole tensor is made of). Steps are those that ``fmt.fit`` stores.
    """
    own = fmt.scale
    alone = own is not None and own.zero is Zero.NONE and not isinstance(own.block, Group | Flat)
    if not (alone and isinstance(fmt.block, Group | Flat) and fmt.zero is Zero.NONE and fmt.grid.width == 1):
        return None
    if not isinstance(fmt.range, AbsMax | PowerOfTwo):
        return None
    n = fmt.block.size
    v, weights = strata(2048)
    upper = -np.expm1(np.log(v) / n) / 2  # P(x > m) where P(max|x| <= m) = v
    m = -quantile(law, np.maximum(upper, 0.5 / total))
    blocks = torch.zeros(len(m), n)
    blocks[:, 0] = torch.from_numpy(m)
    params = fmt.fit(blocks)
    steps = value_of(params.scale).double().reshape(-1).numpy()
    largest = np.zeros(len(m))
    for sign in (1, -1):
        back = fmt.encode(sign * blocks, params).dequantize()[:, 0].double().numpy()
        largest += (back - sign * m) ** 2 / 2
    others = expected_error(steps[:, None] * points_of(fmt.grid), law, m)
    return float(((n - 1) / n * others + largest / n) @ weights)


# -- measured errors


def _snap(grid: Grid, x: Tensor, step: float) -> Tensor:
    """x [n, width] on the grid."""
    middle = (grid.max + grid.min) / 2 if view_of(grid) is View.CENTRED else 0.0
    return (grid.snap(x / step + middle) - middle) * step


def best_measured(grid: Grid, law: Distribution, n: int = 10**6) -> tuple[float, float]:
    """Best step of a grid, searched on few samples, and its mean squared error there on ``n`` weighted ones.

    A vector grid, in which neighbouring values share a code, is given at most 2^18 vectors.
    """
    few = 1 << 13
    if grid.width > 1:  # each vector is compared with every point, at most 2^12 of them
        n, few = min(n, 1 << 18), min(few, (1 << 23) >> min(grid.bits, 12))
    x, weights = weighted_vectors(law, n, grid.width)
    some, some_weights = weighted_vectors(law, few, grid.width)
    if grid.width == 1:
        reach = np.abs(points_of(grid)).max()
        search = {"low": 0.3 / reach, "high": 300 / reach}
    else:
        search = {
            "low": 0.5,
            "high": 4.0,
            "tries": 13,
            "rounds": 2,
        }  # points for variance 1; each try is dear
    if view_of(grid) is View.MAGNITUDE:
        x, some = x.abs(), some.abs()

    def error(x: Tensor, weights: Tensor, step: float) -> float:
        return ((_snap(grid, x, step) - x).double().square().mean(-1) @ weights).item()

    step, _ = _least(lambda steps: np.array([error(some, some_weights, s) for s in steps]), **search)
    return step, error(x, weights, step)


def block_error(fmt: Format, law: Distribution, seed: int = 0) -> float:
    """Mean squared error of a format on a [SIDE, SIDE] matrix of draws in random order."""
    x = random_samples(law, seed)
    return (fmt.quantize(x).dequantize() - x).double().square().mean().item()


def relative_error(fmt: Format, x: Tensor) -> float:
    """|x - dequantize(quantize(x))|^2 / |x|^2 of any tensor that the format's blocks tile."""
    return ((fmt.quantize(x).dequantize() - x).double().square().sum() / x.double().square().sum()).item()


# -- rows of the table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format on one distribution: mean squared errors, the expected one where a formula exists."""

    name: str
    bits: float  # stored per value, scales included
    law: Distribution
    measured: float
    expected: float | None
    bound: float  # no code of that many bits has less


def grid_row(grid: Grid, law: Distribution, n: int = 10**6) -> Row:
    """A grid at its best step for the whole tensor; that one step costs nothing per value."""
    expected = best_expected(grid, law)[1] if grid.width == 1 else None
    _, measured = best_measured(grid, law, n)
    bits = grid.bits / grid.width
    # |x| has one bit of entropy less than x: its sign
    bound = lower_bound(law, bits + (view_of(grid) is View.MAGNITUDE))
    return Row(name=grid.name, bits=bits, law=law, measured=measured, expected=expected, bound=bound)


def format_row(name: str, fmt: Format, law: Distribution, seed: int = 0) -> Row:
    """A block format with its own steps, which its bits count."""
    bits = fmt.bits_per_weight((SIDE, SIDE))
    measured, expected = block_error(fmt, law, seed), expected_block_error(fmt, law)
    bound = lower_bound(law, bits)
    return Row(name=name, bits=bits, law=law, measured=measured, expected=expected, bound=bound)
