"""Cayley SGD: gradient descent over orthogonal matrices, with matrix products alone.

    A = (R^T G - G^T R) / 2         G = dL/dR; what keeps R orthogonal is R times a skew matrix
    t = min(lr, 1 / |A|_1)          |A|_1: the largest sum of a column; keeps the iteration contracting
    R <- R (I + t A / 2)^-1 (I - t A / 2)      by five turns of   Z <- R - t (R + Z) A / 2,   Z = R - t R A

The Cayley transform of a skew matrix is orthogonal, and the turns come to within (t |A| / 2)^6 of it, so R
drifts off in time: it is retracted (QR, signs fixed) as soon as |R^T R - I| shows it.

Li, Fuxin, Todorovic 2020, https://arxiv.org/abs/2002.01113, algorithm 1, for square matrices and without
momentum, as SpinQuant uses it: Liu et al. 2024, https://arxiv.org/abs/2405.16406, section 3.2. There QR comes
by chance, once in 101 steps; here when it is due, so that a seed has no say in it.

Road not taken: solving for Z, which is exact. A factorisation a step is slow where products are fast.

Shapes: R, G, A, Z [n, n] of one dtype, float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TURNS = 5
_DRIFT = 1e-5  # max |R^T R - I| from which R is retracted


@torch.no_grad()
def cayley_step(r: Tensor, g: Tensor, lr: float) -> Tensor:
    """One step of size up to ``lr`` from orthogonal ``r`` [n, n] against the gradient ``g`` [n, n]."""
    r = r / r.norm(dim=1, keepdim=True)
    a = r.mT @ g
    a = (a - a.mT) / 2
    t = (1 / a.abs().sum(0).max().clamp(min=1e-12)).clamp(max=lr)
    z = r - t * (r @ a)
    for _ in range(_TURNS):
        z = r - (t / 2) * ((r + z) @ a)
    return retract(z) if drift(z) > _DRIFT else z


@torch.no_grad()
def retract(r: Tensor) -> Tensor:
    """The orthogonal factor of ``r`` = Q U with a positive diagonal in U; float64 inside, r's dtype."""
    q, u = torch.linalg.qr(r.double())
    return (q * u.diagonal().sign()).to(r.dtype)


@torch.no_grad()
def drift(r: Tensor) -> float:
    """max |R^T R - I|."""
    return float((r.mT @ r - torch.eye(len(r)).to(r)).abs().max())
