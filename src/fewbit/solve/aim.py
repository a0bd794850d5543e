"""Aim at the float output: the weights that make the best of rounded inputs, before they are rounded too.

A layer reads r, rounded, where the float layer reads x. Its least squares weights for the output W x are

    W* = argmin E |W x - W* r|^2 = W E[x r^T] H^-1 = W (I + K H^-1),      H = E[r r^T],  K = E[(x - r) r^T]

and  E |W x - Q r|^2 = tr((W* - Q) H (W* - Q)^T) + const  for any Q, so a solver that minimises with H solves
the whole task when it is handed W* in place of W. The rounding errors of a token are as large in every
direction of a rotated basis and its signal is not: W* is a Wiener filter, which trusts weak directions less.

The target is that of GPTAQ (asymmetric calibration), Li, Yin, Lee, Xiao, Panda 2025,
https://arxiv.org/abs/2504.02692, and of Qronos, https://arxiv.org/abs/2505.11695, with x and r of one run.
Road not taken: x of the float model, as there. It takes a second run of every block, and W* then fits the
noise of few tokens.

Shapes: w [out, in]; h, k [in, in], products averaged over calibration tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.solve.ldlq import Ldlq
from fewbit.solve.solver import Need, Solver


@dataclass(frozen=True, kw_only=True)
class Aimed(Solver):
    """``solver`` on W* in place of W. Inputs that are not rounded leave W as it is.

    damp: share of mean(diag H) added to the diagonal, which holds W* back to W where tokens are few.
    """

    solver: Solver = Ldlq()
    damp: float = 0.03

    def __post_init__(self):
        if not 0 < self.damp < math.inf:
            raise InputError(f"damp {self.damp} of aimed weights must be positive; 0.03 is usual")

    @property
    def needs(self):
        return self.solver.needs | {Need.GRAM, Need.CROSS}

    def check(self, fmt):
        self.solver.check(fmt)

    def together(self, ws, stats, fmt):
        if stats.cross is not None:
            ws = [aimed(w, stats.gram, stats.cross, self.damp) for w in ws]
        return self.solver.together(ws, stats, fmt)


def aimed(w: Tensor, h: Tensor, k: Tensor, damp: float) -> Tensor:
    """W* [out, in] = W (I + K (H + damp mean(diag H) I)^-1), in w's dtype; solved in float64."""
    wide = h.double()
    wide.diagonal().add_(damp * wide.diagonal().mean().clamp(min=torch.finfo(h.dtype).tiny))
    return w + torch.cholesky_solve((w.double() @ k.double()).mT, torch.linalg.cholesky(wide)).mT.to(w)
