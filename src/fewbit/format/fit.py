"""Ways to choose a range: a pure function from the values of each block to the interval the grid must cover.

A range rule returns ``(lo, hi)`` per block; ``Format`` turns the interval into scale and zero, rounds the
scale to its own storage and only then computes the zero and the codes. So one rule serves every grid; what it
may ask of the grid is in `Target`. Rules that assume a distribution are in aciq.py, octav.py and prior.py.

Sources: min-max and p-norm grid: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (reference quantizer:
100 steps, |error|^2.4); percentile: Wu et al. 2020, https://arxiv.org/abs/2004.09602; powers of two: OCP
Microscaling Formats v1.0 and Rouhani et al. 2023, https://arxiv.org/abs/2310.10537; progressive groups:
QServe, Lin et al. 2024, https://arxiv.org/abs/2405.04532.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.grid.grid import Grid
from fewbit.grid.learned import Learned, learn


class Target(Protocol):
    """What a range rule may ask of the Format it serves."""

    grid: Grid

    @property
    def symmetric(self) -> bool:
        """True without a zero: interval [-a, a], a = max(-lo, hi)."""

    @property
    def reach(self) -> float:
        """Steps in the half interval [0, a] of a symmetric format, in the whole [lo, hi] of an affine one."""

    def round_trip(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Blocks [N, n] and trial intervals [N] -> the blocks on the real grid [N, n]."""

    def unit_points(self) -> Tensor:
        """Sorted points of the grid [k] float64 when half the interval is 1; see `Format.unit_points`."""


@dataclass(frozen=True, kw_only=True)
class Range(ABC):
    """A rule that chooses the interval of each block.

    ``of_parent``: a rule for steps that looks at the tensor whose steps they are. ``of_products``: a rule for
    blocks within a row of a weight that looks at the products of their inputs. ``scalar``: a rule that asks
    where the grid's points lie on a line.
    """

    of_parent: ClassVar[bool] = False
    of_products: ClassVar[bool] = False
    scalar: ClassVar[bool] = False

    @property
    def wants_importance(self) -> bool:
        """True when the rule can use the mean squared input of each column, or the products of inputs."""
        return False

    @abstractmethod
    def __call__(self, x: Tensor, fmt: Target, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Blocks ``x`` [..., n] float -> (lo [...], hi [...]).

        ``importance`` broadcasts to ``x`` and is the weight of each element's error, or None. A rule with
        ``of_products`` gets the products of the inputs of each block's columns instead, [in / n, n, n].
        """


@dataclass(frozen=True, kw_only=True)
class AbsMax(Range):
    """The symmetric interval [-max|x|, max|x|], ``headroom`` times as wide."""

    headroom: float = 1.0

    def __post_init__(self):
        if not self.headroom >= 1:
            raise InputError(f"headroom {self.headroom} would clip; it must be at least 1")

    def __call__(self, x, fmt, importance):
        a = x.abs().amax(-1) * self.headroom
        return -a, a


@dataclass(frozen=True, kw_only=True)
class MinMax(Range):
    """The interval [min x, max x]; with ``clip`` below 1 that share of it, and what lies beyond saturates."""

    clip: float = 1.0

    def __post_init__(self):
        if not 0 < self.clip <= 1:
            raise InputError(f"a share of {self.clip} of the range is outside (0, 1]; 1 clips nothing")

    def __call__(self, x, fmt, importance):
        lo, hi = torch.aminmax(x, dim=-1)
        return lo * self.clip, hi * self.clip


@dataclass(frozen=True, kw_only=True)
class Percentile(Range):
    """The interval between the (100 - q)-th and the q-th percentile of each block; 100 is ``MinMax``."""

    q: float = 99.9

    def __post_init__(self):
        if not 50 < self.q <= 100:
            raise InputError(f"percentile {self.q} is outside (50, 100]; 99.9 is usual")

    def __call__(self, x, fmt, importance):
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
                "impossible; norm must be positive, steps at least 1 and shrink in (0, 1]"
            )

    @property
    def wants_importance(self):
        return self.weighted

    def __call__(self, x, fmt, importance):
        shape, n = x.shape[:-1], x.shape[-1]
        weights = importance.expand_as(x).reshape(-1, n) if self.weighted and importance is not None else None

        def loss(error: Tensor, part: slice) -> Tensor:
            error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
            return error.sum(-1) if weights is None else torch.einsum("bn,bn->b", error, weights[part])

        lo, hi = least_loss(x.reshape(-1, n), fmt, loss, self.steps, self.shrink)
        return lo.reshape(shape), hi.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class OutputMSE(Range):
    """The shrunken min-max interval whose error e [n] does least harm to the layer's output: e^T H_gg e.

    H_gg [n, n] holds the mean products of the n inputs that the block multiplies, so this is the mean squared
    error of the block's partial sum over all calibration tokens: AWQ's clip search (Lin et al. 2023,
    https://arxiv.org/abs/2306.00978, reference code), without a sample of tokens and with a finer search.
    Without calibration it is ``MSE``.
    """

    of_products = True
    steps: int = 12
    shrink: float = 0.4

    def __post_init__(self):
        MSE(steps=self.steps, shrink=self.shrink)  # refuses the impossible

    @property
    def wants_importance(self):
        return True

    def __call__(self, x, fmt, importance):
        if importance is None:
            return MSE(steps=self.steps, shrink=self.shrink)(x, fmt, None)

        def loss(error: Tensor, part: slice) -> Tensor:  # [groups, rows, n] -> [groups, rows]
            return torch.einsum("gbn,gbn->gb", error @ importance, error)

        lo, hi = least_loss(x.transpose(0, 1).contiguous(), fmt, loss, self.steps, self.shrink)
        return lo.t().contiguous(), hi.t().contiguous()


@dataclass(frozen=True, kw_only=True)
class Clusters(Range):
    """Tables by k-means: the points of a `Learned` grid with the least sum of squared errors.

    With ``weighted``, errors e [w] of the vectors that meet inputs g count as e H_gg e^T (of scalars: times
    diag H), where the calibration gathered H. ``iterations`` of EM; vectors are thinned evenly to at most
    ``sample`` per entry (0: all). Where there is a step, it is the root mean square of its block.
    """

    iterations: int = 50
    weighted: bool = True
    sample: int = 64

    def __post_init__(self):
        if self.iterations < 1 or self.sample < 0:
            raise InputError(
                f"{self.iterations} iterations on {self.sample} vectors per entry learn no table; give 1 or "
                "more, and 0 for all vectors"
            )

    @property
    def wants_importance(self):
        return self.weighted

    def __call__(self, x, fmt, importance):
        a = torch.linalg.vector_norm(x, dim=-1) / math.sqrt(x.shape[-1])
        return -a, a

    def tables(self, x: Tensor, grid: Learned, cost: Tensor | None) -> Tensor:
        """Vectors [T, N, w] and costs [T, N, w, w] or None -> tables [T, M, K, w]."""
        most = self.sample << grid.entry_bits
        if grid.width > 1 and most and x.shape[1] > most:
            at = torch.linspace(0, x.shape[1] - 1, most, device=x.device, dtype=torch.float64).long()
            x, cost = x[:, at], None if cost is None else cost[:, at]
        return learn(x, grid, cost, self.iterations)


def least_loss(
    x: Tensor, fmt: Target, loss: Callable[[Tensor, slice], Tensor], steps: int, shrink: float
) -> tuple[Tensor, Tensor]:
    """For each row of x [..., N, n], the interval between 1 and ``shrink`` times its own with the least loss.

    ``loss(Q(x) - x [..., M, n], the M rows as a slice)`` -> [..., M]; it may overwrite its argument.
    """
    best_lo, best_hi = torch.aminmax(x, dim=-1)
    # The search reads each element a hundred times: chunks that a CPU's second-level cache holds, and on a
    # GPU chunks that are worth their launches.
    rows = x.shape[-2]
    chunk = max(1, (1 << 16 if x.device.type == "cpu" else 1 << 24) * rows // max(1, x.numel()))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        w, lo, hi = x[..., part, :], best_lo[..., part], best_hi[..., part]
        least, best = torch.full_like(lo, torch.inf), torch.ones_like(lo)

        def attempt(p: Tensor, part=part, w=w, lo=lo, hi=hi) -> None:  # shrink factors, one per block
            nonlocal least, best
            got = loss(fmt.round_trip(w, p * lo, p * hi).sub_(w), part)
            better = got < least
            least, best = torch.where(better, got, least), torch.where(better, p, best)

        for p in torch.linspace(1.0, shrink, steps).tolist():
            attempt(torch.full_like(lo, p))
        coarse, gap = best, (1 - shrink) / max(1, steps - 1)
        for fraction in (-2 / 3, -1 / 3, 1 / 3, 2 / 3):
            attempt((coarse + fraction * gap).clamp(max=1.0))
        best_lo[..., part], best_hi[..., part] = best * lo, best * hi
    return best_lo, best_hi


class Scaling(StrEnum):
    """Which power of two becomes the step of a block whose largest magnitude is A; M is the grid's.

    CEIL and RCEIL never clip. FLOOR clips what lies between M and the next power of two (E4M3: 448 to 512),
    EVEN only what rounds to M anyway. The nearest power of two would clip up to 1.5 M and is left out.
    """

    FLOOR = "floor"  # floor(log2 A) - floor(log2 M): OCP's rule
    EVEN = "even"  # FLOOR, and one more where A would round past M: least error for E2M1
    CEIL = "ceil"  # ceil(log2 A) - floor(log2 M)
    RCEIL = "rceil"  # ceil(log2(A / M)): the least that does not clip; NVIDIA's, for training


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo(Range):
    """The interval whose step is a power of two: MX, block floating point, shared microexponents.

    The rule works on A = max|x|, or on max - min where the format has a zero. Exponents are kept to
    [-127, 127], those of E8M0; an all-zero block gets -127. Intervals are float64, so that steps are exact.
    """

    rule: Scaling = Scaling.FLOOR

    @property
    def scalar(self):
        return self.rule is Scaling.EVEN

    def __call__(self, x, fmt, importance):
        if fmt.symmetric:
            low, spread = None, x.abs().amax(-1).double()
        else:
            low, high = torch.aminmax(x.double(), dim=-1)
            low = low.clamp(max=0)
            spread = high.clamp(min=0) - low
        wide = (self._exponent(spread, fmt).clamp(-127, 127) + 1023 << 52).view(torch.float64) * fmt.reach
        return (-wide, wide) if low is None else (low, low + wide)

    def _exponent(self, a: Tensor, fmt: Target) -> Tensor:
        """int64 exponent of the step; of zero: very small."""
        by_reach = self.rule is Scaling.RCEIL
        emax = 0 if by_reach else math.frexp(fmt.reach)[1] - 1
        significand, e = torch.frexp(a / fmt.reach if by_reach else a)  # significand in [1/2, 1)
        e = e - 1 - emax
        if self.rule is Scaling.EVEN:
            gap = fmt.unit_points()[-2:].diff().item() * fmt.reach / (1 if fmt.symmetric else 2)
            e = e + (significand * 2.0 ** (emax + 1) >= fmt.reach + gap / 2)
        elif self.rule is not Scaling.FLOOR:
            e = e + (significand > 0.5)
        return torch.where(a > 0, e.long(), -1000)


@dataclass(frozen=True, kw_only=True)
class Progressive(Range):
    """QoQ's protective range, the rule of integer steps: the unit of the steps is max|W| / ``protect``.

    W is the tensor whose steps are coded, in the blocks that share a unit (its rows). With protect = 119,
    steps s of 4-bit groups are 238 / 15 < 16 units, so a weight rounded to nearest decodes to at most
    119 + 16 / 2 = 127 of them and the middle tensor fits int8 (QServe, section 4.1). Solvers that feed errors
    forward may choose any code, so here every code fits: s is at most 127 // 8 = 15 (with 16 no zero serves
    both ends), and a zero whose last code would lie beyond 127 moves. What the move clips is less than half
    a step; only a group that spans 233 units or more has its end clipped further, by 14 units at most.
    """

    of_parent = True
    limit: ClassVar[int] = 127  # of int8
    protect: int = 119

    def __post_init__(self):
        if not 1 <= self.protect <= self.limit:
            raise InputError(f"protective range {self.protect} is outside [1, {self.limit}]; 119 is usual")

    def most(self, fmt: Target) -> int:
        """The largest step with which all codes of ``fmt`` can stay within ``limit`` units."""
        ends = -fmt.grid.min, fmt.grid.max
        return int(self.limit // (max(ends) if fmt.symmetric else math.ceil(sum(ends) / 2)))

    def inside(self, zero: Tensor, steps: Tensor, fmt: Target) -> Tensor:
        """The nearest zeros with which all codes stay within ``limit``; steps: whole, 1 to `most`."""
        room = (self.limit // steps).to(zero.dtype)
        return zero.clamp(fmt.grid.max - room, fmt.grid.min + room)

    def __call__(self, x, fmt, importance):
        a = x.abs().amax(-1) / self.protect * fmt.reach
        return -a, a
