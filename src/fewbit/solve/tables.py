"""Tables for given codes: a linear least squares problem. GPTVQ's codebook update, AQLM's phase 2.

    min over C of  tr( (W - Q) H (W - Q)^T ),      Q = s (S C)

S puts entries where their codes are (`decode`), S^T sums what stands there (`collect`), s is the step of each
row. So the gradient is S^T (s ((Q - W) H)): one product with H. Conjugate gradients from the tables at hand,
preconditioned by the diagonal S^T (s^2 diag H) S, take the few steps that matter; then the tables are stored
as their format stores them, and kept only if that lowers the error. A step for each row has the closed form
s_o = (w_o H u_o) / (u_o H u_o), u = S C.

van Baalen et al. 2024 (GPTVQ), https://arxiv.org/abs/2402.15319, section 3.3; Egiazarian et al. 2024 (AQLM),
https://arxiv.org/abs/2401.06118, section 3.3. Both descend by Adam, at a rate that has to be chosen.

Shapes: w, q [out, in], h [in, in], C [T, M, K, w].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.format import Channel, QTensor
from fewbit.grid.learned import collect, decode

_CONVERGED = 1e-9  # of the squared gradient; past it rounding errors steer


def update(w: Tensor, h: Tensor, q: QTensor, steps: int) -> QTensor:
    """``q`` with better tables, then better steps where each row has a plain one; its codes stay.

    The error under ``h`` never rises. Computes in the dtype of ``w``, float32 or float64.
    """
    fmt, book, width, h = q.format, q.format.codebook, q.format.grid.width, h.to(w.dtype)
    codes = book.split(q.codes, width)
    c = book.points(q.table, fmt.grid, w.dtype)
    every = torch.arange(w.shape[1], device=w.device)
    s = fmt.columns(q, w.shape, every)[0].to(w.dtype)

    def spread(c: Tensor) -> Tensor:
        v = decode(codes, c)
        return book.block.join(v.view(*book.block.scale_shape(w.shape), -1), w.shape) * s

    gather = lambda g: collect(codes, book.vectors(g * s, width), c)  # noqa: E731
    weight = gather((s * h.diagonal()).expand_as(w)).clamp(min=1e-12)  # entries that no code means keep still
    r = gather((w - spread(c)) @ h)
    z = r / weight
    p, rz = z, (r * z).sum()
    enough = _CONVERGED * rz
    for _ in range(steps):
        hp = spread(p) @ h
        curvature = (hp * spread(p)).sum()
        if not (rz > enough and curvature > 0):
            break
        c = c + rz / curvature * p
        r = r - rz / curvature * gather(hp)
        z = r / weight
        rz, last = (r * z).sum(), rz
        p = z + rz / last * p
    best, least = q, error(w, h, q)
    trial = replace(q, table=book.keep(c))
    if (got := error(w, h, trial)) < least:
        best, least = trial, got
    if isinstance(fmt.block, Channel) and fmt.scale is not None and fmt.scale.scale is None:
        u = best.dequantize(w.dtype) / s
        uh = u @ h
        fitted = (uh * w).sum(1, keepdim=True) / (uh * u).sum(1, keepdim=True).clamp(min=1e-30)
        raw = torch.where(fitted > 0, fitted, s[:, :1])
        trial = replace(best, scale=fmt.store(raw, w))
        if error(w, h, trial) < least:
            best = trial
    return best


def error(w: Tensor, h: Tensor, q: QTensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    e = w - q.dequantize(w.dtype)
    return float(((e @ h) * e).sum())
