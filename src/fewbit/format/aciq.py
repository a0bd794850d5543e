"""ACIQ: clips from two moments and a prior; bits for each channel; bias correction.

Banner, Nahshan, Hoffer, Soudry 2018, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", https://arxiv.org/abs/1810.05723. Under a prior with one parameter (Laplace b = E|x|, Gauss
sigma), rounding plus clipping noise at clip alpha and M bits is (eq. 5 for Laplace, b = 1)

    E[(x - Q(x))^2] ~ 2 exp(-alpha) + alpha^2 / (3 4^M),        least at alpha exp(alpha) = 3 4^M     (eq. 6)

so the best clip is a number times the parameter. `clip` and `noise` are these formulas. They describe 2^M
bins whose clipped values come back at alpha exactly, 2^M + 1 points; the rule `ACIQ` takes the number for the
real grid from `best_clip`, so it serves every grid (4 affine levels: 1.49 sigma; the formula says 1.71).

Road not taken: the prior whose predicted error is the lowest (the "mix" of the paper's code). That compares
predictions with each other; the likelihood compares each prior with the data.

Shapes: blocks x [..., n]; lo, hi [...]; alpha [C], one per channel; w [out, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format.block import Channel, Group
from fewbit.format.fit import Range
from fewbit.format.prior import SEGMENT, Frame, Prior, best_clip, clip_blocks, half_points
from fewbit.format.qtensor import QTensor, value_of


def noise(alpha: float, bits: int, prior: Prior, one_sided: bool = False) -> float:
    """The paper's model of the mean squared error of clip ``alpha`` (eq. 5), for parameter b or sigma = 1.

    ``one_sided``: per non-zero element of max(x, 0) on [0, alpha].
    """
    rounding = alpha**2 / (3 * 4 ** (bits + one_sided))
    if prior == Prior.LAPLACE:
        return 2 * math.exp(-alpha) + rounding
    density = math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2)
    return (alpha**2 + 1) * math.erfc(alpha / math.sqrt(2)) - alpha * density + rounding


def clip(bits: int, prior: Prior, one_sided: bool = False) -> float:
    """The alpha with the least ``noise`` (eq. 6): Newton for Lambert's W (Laplace), bisection (Gauss).

    ``one_sided`` equals two-sided with one bit more. Raises ``InputError`` outside 1 to 16 bits.
    """
    if not 1 <= bits <= 16:
        raise InputError(f"a clip for {bits} bits is not tabled; use 1 to 16")
    c = 1 / (3 * 4 ** (bits + one_sided))
    if prior == Prior.LAPLACE:
        alpha = math.log(1 / c)  # above the root: Newton on alpha + ln alpha = ln 1/c then converges
        for _ in range(20):
            alpha *= (1 - math.log(alpha * c)) / (1 + alpha)
        return alpha
    low, high = 0.0, 16.0
    while high - low > 1e-12:
        alpha = (low + high) / 2
        over = math.exp(-(alpha**2) / 2) * math.sqrt(2 / math.pi) - alpha * math.erfc(alpha / math.sqrt(2))
        low, high = (alpha, high) if c * alpha < over else (low, alpha)
    return (low + high) / 2


@dataclass(frozen=True, kw_only=True)
class ACIQ(Range):
    """The interval that is best for the grid if each block follows ``prior``; None: the likelier of the two.

    Moments are about 0 for symmetric formats and about the mean for affine ones. Where an affine format meets
    a block without negative elements (after a ReLU), the interval is [0, a] and the parameter that of the
    distribution before the ReLU. Zeros cost nothing there and are left out, except about a mean. The interval
    never exceeds the data.
    """

    scalar = True
    prior: Prior | None = None

    def __post_init__(self):
        if self.prior is not None and self.prior not in tuple(Prior):
            raise InputError(f"prior {self.prior!r} is not known; use gauss, laplace or None (data choose)")

    def __call__(self, x, fmt, importance):
        two_sided, half = fmt.unit_points(), half_points(fmt)
        factors = {p: (best_clip(two_sided, p), best_clip(half, p, True)) for p in Prior}

        def clip(frame: Frame) -> Tensor:
            n, total, squares = frame.top.new_zeros(3, len(frame.top), dtype=torch.float64)
            for part in frame.x.split(SEGMENT, -1):
                y = frame.magnitudes(part)
                total += y.sum(-1)
                squares += torch.linalg.vecdot(y, y)
                n += y.sign_().sum(-1)  # a seventh of the time of count_nonzero on a CPU
            if not fmt.symmetric:
                n = torch.where(frame.one_sided, n, frame.x.shape[-1])
            n = n.clamp(min=1)
            b, sigma = total / n, (squares / n).sqrt()
            k = {p: torch.where(frame.one_sided, v[1], v[0]).double() for p, v in factors.items()}
            if self.prior is None:  # log-likelihood of an element: -ln(2 e b), -ln(sigma sqrt(2 pi e))
                laplace = 2 * math.e * b < sigma * math.sqrt(2 * math.pi * math.e)
            else:
                laplace = torch.full_like(frame.one_sided, self.prior == Prior.LAPLACE)
            return torch.where(laplace, b * k[Prior.LAPLACE], sigma * k[Prior.GAUSS])

        return clip_blocks(x, fmt, clip)


def allocate(alpha: Tensor, bits: float) -> Tensor:
    """Bits of each channel, int64 [C] in 0..8 with sum floor(C bits): 2^M_i ~ alpha_i^(2/3) (eq. 11).

    alpha: [C] >= 0, clips or standard deviations. No search for the t with which M_i = round(t + 2/3 log2
    alpha_i) meets the budget: channel i takes its j-th bit at t = j - 1/2 - 2/3 log2 alpha_i, so the least
    floor(C bits) of these thresholds are the bits. Raises ``InputError`` for a budget outside [0, 8] or an
    alpha that is negative or not finite.
    """
    if not 0 <= bits <= 8:
        raise InputError(f"an average of {bits} bits cannot be allocated; channels take 0 to 8")
    if alpha.ndim != 1 or not (torch.isfinite(alpha) & (alpha >= 0)).all():
        raise InputError(
            f"allocation needs a vector of finite clips >= 0, one per channel, got shape {list(alpha.shape)} "
            "with other values or sides"
        )
    steps = torch.arange(1, 9, device=alpha.device, dtype=torch.float64) - 0.5
    thresholds = steps - 2 / 3 * alpha.double().log2().unsqueeze(-1)  # [C, 8]; infinite for alpha = 0
    budget = math.floor(len(alpha) * bits + 1e-9)
    taken = thresholds.flatten().sort(stable=True).indices[:budget] // 8
    return torch.bincount(taken, minlength=len(alpha))


def correct_bias(w: Tensor, q: QTensor, variance: bool = True) -> QTensor:
    """``q`` with the mean and standard deviation of each row of ``w``, in its scale and offset (eq. 12, 13).

        q' = xi (q - mean q) + mean w,   xi = std w / std q         xi = 1 without ``variance``

    w: [out, in]. Exact up to the storage of scale and offset. Raises ``InputError`` for a format without
    offset or with blocks that span rows, and for weights of another shape.
    """
    fmt = q.format
    if fmt.zero != "offset" or fmt.offsets is not None or not isinstance(fmt.block, Channel | Group):
        raise InputError(
            f"bias correction moves each row's mean, which {fmt} cannot hold; use zero=offset with a channel "
            "or group block"
        )
    if w.shape != q.shape:
        raise InputError(f"weights {list(w.shape)} and codes {list(q.shape)} differ; give the originals")
    w, now = w.double(), q.dequantize(torch.float64)
    if variance:
        spread = now.std(-1, correction=0, keepdim=True)
        xi = torch.where(spread > 0, w.std(-1, correction=0, keepdim=True) / spread, 1)
        scale = fmt.store((value_of(q.scale).double() * xi).float(), w.float())
        q = replace(q, scale=scale, zero=(q.zero.double() * xi).to(q.zero.dtype))
        now = q.dequantize(torch.float64)
    shift = (w - now).mean(-1, keepdim=True)
    return replace(q, zero=(q.zero.double() + shift).to(q.zero.dtype))
