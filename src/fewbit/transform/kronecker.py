"""Random orthogonal maps from two Kronecker factors: QuIP's incoherence, for any size at n (p + q) cost.

    x T = x[order] (A x B),    A [p, p], B [q, q] random orthogonal (x: Kronecker),  n = p q,  order random

Read x as a p by q matrix: A^T X B. A, B are Haar: Q of the QR of a Gaussian matrix, columns flipped to make
the diagonal of R positive; p is the largest divisor up to sqrt(n). QuIP, Chee et al. 2023,
https://arxiv.org/abs/2307.13304, section 4.1. Entries of A x B are products of two Gaussians, which
have heavier tails than Hadamard's +-1 / sqrt(n): a lone outlier of 1000 sigma stays at 15 to 25 where
`Hadamard` leaves 4. What it has instead: no size asks for anything else than its factors.

Road not taken: one Haar matrix, n^2 work and storage. It is what this becomes when n is prime.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.transform.maps import Map


@dataclass(frozen=True)
class Kronecker(Map):
    """The random orthogonal map of a size; plain data that means one matrix on every device.

    Drawn in float64 on the CPU from ``seed``. Raises ``InputError`` for sizes below 1.
    """

    size: int
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise InputError(f"a Kronecker map of size {self.size} is impossible; give a positive size")

    @property
    def factors(self) -> tuple[int, int]:
        """p <= q, p q = size: (24, 24) for 576, (32, 48) for 1536, (1, n) for a prime."""
        p = next(p for p in range(math.isqrt(self.size), 0, -1) if self.size % p == 0)
        return p, self.size // p

    def __str__(self) -> str:
        """'Kronecker 1536 = 32 x 48, seed 0'."""
        p, q = self.factors
        return f"Kronecker {self.size} = {p} x {q}, seed {self.seed}"

    def _apply(self, x):
        a, b, order = _drawn(self, x.device, x.dtype)
        return (a.T @ x[..., order].unflatten(-1, self.factors) @ b).flatten(-2)

    def _invert(self, x):
        a, b, order = _drawn(self, x.device, x.dtype)
        return (a @ x.unflatten(-1, self.factors) @ b.T).flatten(-2)[..., order.argsort()]


@functools.lru_cache(maxsize=64)
def _drawn(t: Kronecker, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A [p, p], B [q, q] and order [n]."""
    with torch.inference_mode(False), torch.no_grad():
        draw = torch.Generator().manual_seed(t.seed)
        order = torch.randperm(t.size, generator=draw)
        a, b = (_haar(k, draw).to(device, dtype) for k in t.factors)
        return a, b, order.to(device)


def _haar(k: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix [k, k] float64."""
    q, r = torch.linalg.qr(torch.randn(k, k, generator=draw, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
