"""Refinement: go over the codes again, each against all the others. Coordinate descent on the layer's error.

    min over codes of  tr( (W - Q) H (W - Q)^T )

With every other column fixed, the columns b of a row have their least at t_b, and are rounded there:

    q_b = round(t_b),    t_b = q_b + (E H)_b H_bb^-1,    E = W - Q

LDLQ chose q_b before it knew what later columns would do; this knows. It is QuIP's greedy pass ("RG", Chee et
al. 2023, https://arxiv.org/abs/2307.13304, section 5) and QuIP#'s block version (Tseng et al. 2024,
https://arxiv.org/abs/2402.04396). The nearest point to t_b is the best one only where H_bb is a multiple of
I, so with several columns a code is kept only if it lowers the error: with d = q_new - q_old,

    d H_bb d^T - 2 (E H)_b d^T < 0

which makes every pass monotone for every grid. Learned tables are searched under H_bb itself: for sums of
several books that is AQLM's beam search (Egiazarian et al. 2024, https://arxiv.org/abs/2401.06118, section
3.3) with the beam over the codes of one vector.

Shapes as in ldlq: e_t [in, out] is (W - Q)^T, g_t [columns, out] rows of H E^T. A pass costs one product of H
with E, twice what LDLQ's feedback costs.

Road not taken: a running E H over all columns, updated after each. It is the same arithmetic, drifts in
float32 and is as large as W. A beam that runs on from vector to vector (AQLM): each of its members needs E H
of its own, copied whenever they change places.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.format import QTensor
from fewbit.format.format import Params
from fewbit.solve.columns import Tables, round_columns, steps_of

_LAZY = 128  # columns between two products with all errors


def refine(w: Tensor, h: Tensor, q: QTensor, passes: int) -> QTensor:
    """Codes with no more error than those of ``q`` for ``w`` [out, in] under ``h`` [in, in]; its steps stay.

    Columns in their order, up to ``passes`` times; stops when a pass changes nothing. Channels that were
    never excited keep their codes. Computes in the dtype of ``w``, float32 or float64.
    """
    fmt, width, height = q.format, q.format.grid.width, getattr(q.format.grid, "height", 1)
    n, h = w.shape[1], h.to(w.dtype)
    tiles = torch.stack([h[i : i + width, i : i + width] for i in range(0, n, width)])
    inverse = torch.linalg.pinv(tiles.double(), rtol=1e-6, hermitian=True).to(w.dtype)  # 0 where H is 0
    s, z = steps_of(fmt, Params(scale=q.scale, zero=q.zero), w.shape, torch.arange(n, device=w.device))
    tables = None if fmt.codebook is None else Tables(fmt, q.table, w.shape)
    codes = q.codes.t().contiguous()
    q_t = q.dequantize().t().to(w.dtype).contiguous()
    w_t = w.t().contiguous()
    e_t, lazy = w_t - q_t, max(1, _LAZY // width) * width
    for _ in range(passes):
        changed = torch.zeros((), dtype=torch.bool, device=w.device)
        for start in range(0, n, lazy):
            stop = min(start + lazy, n)
            g_t = h[start:stop] @ e_t
            for i in range(start, stop, width):
                b = slice(i, i + width)
                g = g_t[i - start : i - start + width]
                own = tiles[i // width]
                target, zero = q_t[b] + inverse[i // width] @ g, None if z is None else z[b]
                at = () if tables is None else (tables.at(i), own)
                code, value = round_columns(fmt, target, s[b], zero, *at)
                d = value - q_t[b]
                change = (d * (own @ d - 2 * g)).sum(0)  # [out]
                if height > 1:  # the rows of a tile are chosen together
                    change = change.view(-1, height).sum(1).repeat_interleave(height)
                better = change < 0
                codes[i // width] = torch.where(better, code, codes[i // width])
                q_t[b] = torch.where(better, value, q_t[b])
                e_t[b] = w_t[b] - q_t[b]
                d *= better
                g_t[i - start + width :] -= h[i + width : stop, b] @ d
                changed |= better.any()
        if not changed:
            break
    return replace(q, codes=codes.t().contiguous())
