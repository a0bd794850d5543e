"""Distributions to judge formats by, of mean 0 and variance 1: moments, bounds on any code, samples.

No code of R bits per value has less error than D(R) (Shannon 1959), and

    D(R) >= e^(2h) / (2 pi e) 4^-R

with h the differential entropy in nats (Shannon's lower bound; for Gauss it is D(R) = 4^-R itself). The best
2^R scalar points approach (1/12) (integral of f^(1/3))^3 4^-R as R grows (Panter and Dite 1951,
https://doi.org/10.1109/JRPROC.1951.230493), which for Gauss is sqrt(3) pi / 2 = 2.72 times the bound: 1.53 dB
of the 4.35 dB are the shape of the cells (pi e / 6), the rest is the fixed length of the codes.

Road not taken: independent draws for scalar grids. A million of them from Student's t are good for a few
percent, because a handful of far ones decides; strata that grow narrow towards the tails, one point each with
its probability as weight, are good for 0.01 %.
"""

import functools
import math
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from fewbit.format.prior import Prior
from fewbit.format.prior import partial_moments as prior_moments

NU = 5.0  # degrees of freedom of Student's t: the heaviest tail with an integer NU and a fourth moment
_T_UNIT = math.sqrt((NU - 2) / NU)  # t times this has variance 1
_B = math.sqrt(0.5)  # scale of the Laplace distribution of variance 1
_HALF = math.sqrt(3.0)  # the uniform distribution of variance 1 is that on [-_HALF, _HALF]
SIDE = 1024  # matrices of samples are [SIDE, SIDE]


class Distribution(StrEnum):
    """Densities of mean 0 and variance 1, from light to heavy tails."""

    UNIFORM = "uniform"
    GAUSS = "Gauss"
    LAPLACE = "Laplace"
    STUDENT = "Student t, nu = 5"


_PRIORS = {Distribution.GAUSS: (Prior.GAUSS, 1.0), Distribution.LAPLACE: (Prior.LAPLACE, _B)}
TABLED = (Distribution.GAUSS, Distribution.LAPLACE, Distribution.STUDENT)  # what tables and pictures show


def quantile(law: Distribution, u: np.ndarray) -> np.ndarray:
    """x with F(x) = u, for u in (0, 1); float64. Exact in the lower tail: take -quantile(1 - u) above 1/2."""
    from scipy import special

    u = np.asarray(u, dtype=np.float64)
    if law is Distribution.UNIFORM:
        return (2 * u - 1) * _HALF
    if law is Distribution.GAUSS:
        return special.ndtri(u)
    if law is Distribution.LAPLACE:
        return np.where(u < 0.5, _B * np.log(2 * u), -_B * np.log(2 * np.maximum(1 - u, 1e-300)))
    return special.stdtrit(NU, u) * _T_UNIT


def partial_moments(law: Distribution, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals of f, t f and t^2 f up to x (the last two less a constant), float64; x may be +-inf."""
    from scipy import special

    x = np.asarray(x, dtype=np.float64)
    if law is Distribution.UNIFORM:
        c = np.clip(x, -_HALF, _HALF)
        return (c + _HALF) / (2 * _HALF), c**2 / (4 * _HALF), c**3 / (6 * _HALF)
    if law in _PRIORS:
        prior, unit = _PRIORS[law]
        moments = prior_moments(torch.from_numpy(np.atleast_1d(x / unit)), prior)
        return tuple(m.numpy().reshape(x.shape) * unit**power for power, m in enumerate(moments))
    t = np.clip(x, -1e30, 1e30) / _T_UNIT
    front = math.exp(math.lgamma((NU + 1) / 2) - math.lgamma(NU / 2)) / math.sqrt(NU * math.pi)
    tail = front * NU * (1 + t**2 / NU) ** (-(NU - 1) / 2)  # (NU + t^2) f(t)
    below = special.stdtr(NU, t)
    second = (NU * below - t * tail) / (NU - 2)
    return below, -tail / (NU - 1) * _T_UNIT, second * _T_UNIT**2


def entropy(law: Distribution) -> float:
    """Differential entropy h in nats."""
    if law is Distribution.UNIFORM:
        return math.log(2 * _HALF)
    if law is Distribution.GAUSS:
        return 0.5 * math.log(2 * math.pi * math.e)
    if law is Distribution.LAPLACE:
        return 1 + math.log(2 * _B)
    from scipy import special

    log_beta = special.betaln(NU / 2, 0.5)
    digammas = special.digamma((NU + 1) / 2) - special.digamma(NU / 2)
    return float((NU + 1) / 2 * digammas + 0.5 * math.log(NU) + log_beta + math.log(_T_UNIT))


def lower_bound(law: Distribution, bits: float) -> float:
    """Shannon's lower bound on the mean squared error of any code of ``bits`` per value; exact for Gauss."""
    return math.exp(2 * entropy(law)) / (2 * math.pi * math.e) * 4.0**-bits


def panter_dite(law: Distribution, bits: float) -> float:
    """What the best 2^bits scalar points approach as the bits grow."""
    if law is Distribution.UNIFORM:
        cube = (2 * _HALF) ** 2
    elif law is Distribution.GAUSS:
        cube = 6 * math.sqrt(3) * math.pi
    elif law is Distribution.LAPLACE:
        cube = 108 * _B**2
    else:
        from scipy import special

        power = (NU + 1) / 6
        front = math.exp(math.lgamma((NU + 1) / 2) - math.lgamma(NU / 2)) / math.sqrt(NU * math.pi)
        cube = front * (math.sqrt(NU) * special.beta(0.5, power - 0.5)) ** 3 * _T_UNIT**2
    return float(cube) / 12 * 4.0**-bits


def strata(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles of n strata of (0, 1), narrow as v^3 towards both ends, and their probabilities: [n], [n]."""
    v = (np.arange(n) + 0.5) / n
    weights = v**2 * (1 - v) ** 2
    return v**3 * (10 - 15 * v + 6 * v**2), weights / weights.sum()


@functools.lru_cache(maxsize=8)
def weighted_samples(law: Distribution, n: int) -> tuple[Tensor, Tensor]:
    """x [n] float32 ascending and its probabilities [n] float64: one point for each stratum."""
    u, weights = strata(n)
    lower = quantile(law, u[: n // 2])
    x = np.concatenate([lower, np.zeros(n % 2), -lower[::-1]])
    return torch.from_numpy(x).float(), torch.from_numpy(weights)


def weighted_vectors(law: Distribution, n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n, width] float32 of independent coordinates and probabilities [n]: strata paired at random.

    For one coordinate `weighted_samples` itself.
    """
    x, weights = weighted_samples(law, n)
    if width == 1:
        return x.unsqueeze(-1), weights
    rng = np.random.default_rng(seed)
    order = [torch.from_numpy(rng.permutation(n)) for _ in range(width)]
    joint = torch.stack([weights[o] for o in order]).prod(0)
    return torch.stack([x[o] for o in order], -1), joint / joint.sum()


@functools.lru_cache(maxsize=4)
def random_samples(law: Distribution, seed: int = 0, side: int = SIDE) -> Tensor:
    """[side, side] float32 in random order: one draw from each of side^2 strata of equal probability."""
    rng = np.random.default_rng(seed)
    n = side**2
    u = (rng.permutation(n) + rng.random(n)) / n
    x = np.where(u < 0.5, quantile(law, np.minimum(u, 0.5)), -quantile(law, np.minimum(1 - u, 0.5)))
    return torch.from_numpy(x).float().reshape(side, side)
