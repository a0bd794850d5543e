"""Clips on the real grid: samples without noise in the tails, and a brute-force search."""

import torch

from fewbit.format import FP32, Format, Zero
from fewbit.format.prior import Prior
from fewbit.grid import Int, Table


def uniform(k: int) -> torch.Tensor:
    return torch.linspace(-1, 1, k, dtype=torch.float64)


def stratified(prior: Prior, n: int = 1 << 18) -> torch.Tensor:
    """Samples at the quantiles (i + 1/2) / n: tails without noise."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if prior is Prior.GAUSS:
        return torch.special.ndtri(p)
    return torch.sign(p - 0.5) * -torch.log1p(-2 * (p - 0.5).abs())


def real_formats(bits: int) -> list[Format]:
    """Symmetric narrow, affine, and the paper's 2^B + 1 points."""
    steps = 2 ** (bits - 1)
    paper = Table("paper", (torch.arange(-steps, steps + 1) / steps).tolist())
    return [
        Format(grid=Int(bits, narrow=True), scale=FP32),
        Format(grid=Int(bits, signed=False), zero=Zero.OFFSET, scale=FP32),
        Format(grid=paper, scale=FP32),
    ]


def search(fmt: Format, x: torch.Tensor, about: float) -> tuple[float, float]:
    """Least mean squared error, and its clip, over clips within 8 % of ``about`` in steps of 0.4 %."""

    def error(a: float) -> float:
        half = torch.tensor([a], dtype=x.dtype)
        return (fmt.round_trip(x[None], -half, half) - x).square().mean().item()

    return min((error(about * (0.92 + 0.004 * i)), about * (0.92 + 0.004 * i)) for i in range(41))


def error_at(fmt: Format, x: torch.Tensor, a: torch.Tensor) -> float:
    return (fmt.round_trip(x[None], -a.reshape(1), a.reshape(1)) - x).square().mean().item()
