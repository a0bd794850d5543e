"""LDLQ: round one column (or ``grid.width`` columns) at a time, feeding the error forward. GPTQ is this.

    min over codes of  tr( (W - Q) H (W - Q)^T ),      H = X^T X / tokens

Factor H = M D M^T with M unit upper triangular (block-unit for width > 1). Then, with E = W - Q,

    tr(E H E^T) = sum_i D_ii || (E M)_i ||^2,      (E M)_i = ( w_i + sum_{k<i} E_k M_ki ) - q_i

so going from the first column to the last, each term is made least by rounding what stands in the bracket:

    q_i = round( w_i + sum_{k<i} (w_k - q_k) M_ki )                                          (QuIP, eq. 2)

GPTQ: Frantar, Ashkboos, Hoefler, Alistarh 2022, https://arxiv.org/abs/2210.17323. Its update
W[:, j>i] -= e_i U[i, j] / U[i, i] with H^-1 = U^T U is the same rule, since M = U^-1 diag(U): Chee, Cai,
Kuleshov, De Sa 2023 (QuIP), https://arxiv.org/abs/2307.13304, Theorem 6. Two things follow that the GPTQ
codes do not have: H is factored once and never inverted (a third of the arithmetic), and the error is taken
against the original weights, so blocks of ``lazy`` columns need one product with the past errors and no
second copy of W.

Shapes (rows are the outputs; work is transposed so that a column is contiguous):
    w_t [in, out]   weights in processing order      e_t [in, out]   w - q      m [in, in]   M

Road not taken: zeroing the weights of input channels that calibration never excited (GPTQ's reference does).
They are rounded to nearest instead: the channel may wake up on other text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Channel, Format, Group, QTensor
from fewbit.format.format import Params
from fewbit.solve.columns import Tables, round_columns, steps_of
from fewbit.solve.refine import refine
from fewbit.solve.solver import Need, Solver, SolverWarning


@dataclass(frozen=True, kw_only=True)
class Ldlq(Solver):
    """GPTQ and its relatives.

    damp: share of mean(diag H) added to the diagonal; act_order: columns with the largest diag(H) first;
    static_groups: steps are fitted once on the original weights (needed with act_order), else each group is
    refitted when its first column is reached, on weights that carry the errors made so far; lazy: columns
    between two products with all past errors (speed only); passes: times that `refine` goes over all codes
    afterwards, on the damped matrix as well (QuIP# makes 10).
    """

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    lazy: int = 128
    passes: int = 0

    def __post_init__(self):
        if not 0 <= self.damp <= 1:
            raise InputError(f"damp {self.damp} is outside [0, 1]; 0.01 is usual")
        if self.lazy < 1:
            raise InputError(f"lazy block of {self.lazy} columns is impossible; 128 is usual")
        if self.passes < 0:
            raise InputError(f"{self.passes} passes of refinement are impossible; 0 or more, 10 is usual")
        if self.act_order and not self.static_groups:
            raise InputError(
                "act_order with static_groups=false would need a gather index (g_idx) that no engine reads "
                "any more; set static_groups=true or act_order=false"
            )

    @property
    def needs(self):
        return frozenset({Need.GRAM})

    def check(self, fmt):
        if not self.static_groups and (
            not isinstance(fmt.block, Group | Channel) or fmt.scale.scale is not None
        ):
            raise InputError(
                f"static_groups=false refits scales column group by column group and cannot serve {fmt}; "
                "set static_groups=true"
            )

    def together(self, ws, stats, fmt):
        return ldlq(ws, stats.gram, fmt, self)


def ldlq(ws: Sequence[Tensor], h: Tensor, fmt: Format, how: Ldlq) -> list[QTensor]:
    """Codes for matrices [out_i, in] that read one input, under its Gram matrix ``h`` [in, in]; float32 or
    float64 as they are.

    Each has its own steps; what couples rows (a step per tensor, a tile of rows) stays within a matrix.
    Warns with ``SolverWarning`` when damping had to be raised. Raises ``InputError`` for NaN in ``h``.
    """
    if fmt.codebook is not None and len(ws) > 1:  # tables follow the shape of their matrix
        return [q for w in ws for q in ldlq([w], h, fmt, how)]
    width, n = fmt.grid.width, ws[0].shape[1]
    order = torch.arange(n, device=h.device)
    if how.act_order:  # whole vectors of `width` columns move together
        order = h.diagonal().unflatten(0, (-1, width)).sum(-1).argsort(descending=True, stable=True)
        order = (order[:, None] * width + torch.arange(width, device=h.device)).flatten()
    dtype = ws[0].dtype
    m, own = factor(h.index_select(0, order).index_select(1, order).to(dtype), how.damp, width)
    rounding = _Fixed(ws, h, fmt, order, how.lazy, own) if how.static_groups else _Refitted(ws, h, fmt)
    w_t = torch.cat([w.t() for w in ws], 1)[order]
    codes = torch.empty(n // width, w_t.shape[1], dtype=fmt.grid.code_dtype, device=w_t.device)
    codes[order[::width] // width] = feed_back(w_t, m, rounding, width, how.lazy)
    parts = codes.t().split([len(w) for w in ws])
    solved = [
        QTensor(codes=c.contiguous(), scale=p.scale, zero=p.zero, format=fmt, shape=w.shape, table=p.table)
        for w, c, p in zip(ws, parts, rounding.params(), strict=True)
    ]
    if not how.passes:
        return solved
    h = damped(h, how.damp)
    return [refine(w, h, q, how.passes) for w, q in zip(ws, solved, strict=True)]


class Rounding(Protocol):
    """What `feed_back` rounds with: steps known before, or fitted as their columns are reached."""

    span: int  # columns that must not be cut by a lazy block: a vector, or a group that is refitted

    def __call__(self, i: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Round the first ``width`` of the columns from i on, ``rest`` [at least span - i % span, out], which
        carry all errors made so far: codes [out] and what they mean [width, out].
        """


def feed_back(w_t: Tensor, m: Tensor, rounding: Rounding, width: int, lazy: int) -> Tensor:
    """The loop: columns ``w_t`` [in, out] in order, each with the errors before it; codes [in / width, out].

    m: the unit factor of H, in the same order.
    """
    n, out = len(w_t), []
    e_t = torch.empty_like(w_t)
    lazy = max(1, lazy // rounding.span) * rounding.span
    for start in range(0, n, lazy):
        stop = min(start + lazy, n)
        block = w_t[start:stop] + m[:start, start:stop].t() @ e_t[:start]
        for i in range(start, stop, width):
            code, value = rounding(i, block[i - start :])
            out.append(code)
            error = torch.sub(w_t[i : i + width], value, out=e_t[i : i + width])
            rest = block[i - start + width :]
            if len(rest):
                rest.addmm_(m[i : i + width, i + width : stop].t(), error)
    return torch.stack(out)


class _Fixed:
    """Steps fitted once on the original weights; those of some columns ahead are laid out at a time."""

    def __init__(self, ws: Sequence[Tensor], h: Tensor, fmt: Format, order: Tensor, ahead: int, own: Tensor):
        self.span, self.ws, self.fmt, self.order = fmt.grid.width, ws, fmt, order
        self.fits = [fmt.fit(w, h) for w in ws]
        self.own = own
        self.tables = None if fmt.codebook is None else Tables(fmt, self.fits[0].table, ws[0].shape)
        self.columns = [] if fmt.codebook is None else order.tolist()
        self.ahead, self.first, self.stop = max(1, ahead // self.span) * self.span, 0, 0

    def params(self) -> list[Params]:
        return self.fits

    def __call__(self, i, rest):
        if i >= self.stop:
            self.first, self.stop = i, i + self.ahead
            of, each = self.order[i : self.stop], zip(self.fits, self.ws, strict=True)
            self.s, self.z = _beside([steps_of(self.fmt, p, w.shape, of) for p, w in each], self.ws)
        mine = slice(i - self.first, i - self.first + self.span)
        z = None if self.z is None else self.z[mine]
        if self.tables is None:
            return round_columns(self.fmt, rest[: self.span], self.s[mine], z)
        own = self.own[i // self.span]
        points = self.tables.at(self.columns[i])
        return round_columns(self.fmt, rest[: self.span], self.s[mine], z, points, own @ own.mT)


class _Refitted:
    """Steps fitted group by group when the first column is reached, on weights that carry the errors."""

    def __init__(self, ws: Sequence[Tensor], h: Tensor, fmt: Format):
        self.span = fmt.block.size if isinstance(fmt.block, Group) else len(h)
        self.h, self.fmt, self.sizes = h, fmt, [len(w) for w in ws]
        self.fits: list[Params] = []

    def params(self) -> list[Params]:
        scale = torch.cat([_tensor(p.scale) for p in self.fits], -1).split(self.sizes)
        if self.fits[0].zero is None:
            return [Params(scale=s, zero=None) for s in scale]
        zero = torch.cat([p.zero for p in self.fits], -1).split(self.sizes)
        return [Params(scale=s, zero=z) for s, z in zip(scale, zero, strict=True)]

    def __call__(self, i, rest):
        width, span = self.fmt.grid.width, self.span
        if i % span == 0:
            group = slice(i, i + span)
            self.fits.append(self.fmt.fit(rest[:span].t(), self.h[group, group]))
            shape = (sum(self.sizes), span)
            self.s, self.z = steps_of(self.fmt, self.fits[-1], shape, torch.arange(span, device=rest.device))
        mine = slice(i % span, i % span + width)
        return round_columns(self.fmt, rest[:width], self.s[mine], None if self.z is None else self.z[mine])


def damped(h: Tensor, damp: float) -> Tensor:
    """H + damp mean(diag H) I: what codes and tables are chosen under after the first pass."""
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)


def unit_factor(h: Tensor, damp: float, width: int = 1) -> Tensor:
    """M alone of `factor`."""
    return factor(h, damp, width)[0]


def factor(h: Tensor, damp: float, width: int = 1) -> tuple[Tensor, Tensor]:
    """M and R of H + damp mean(diag H) I = M D M^T: unit upper triangular, block-unit for ``width`` columns.
    [n, n]; R [n / width, width, width] upper triangular, D = R R^T block by block: what an error there costs.

    One Cholesky of the reversed matrix gives H = R R^T with R upper; M = R D^-1/2. A channel that was never
    excited (zero diagonal) gets a 1, so it neither gives nor takes feedback. When the factorisation fails it
    is tried in float64, then with ten times the damping until it succeeds, each raise reported.
    """
    n = len(h)
    if not torch.isfinite(h.sum()):
        raise InputError(
            "the Gram matrix of a layer holds NaN or Inf: the model overflows on the calibration text; "
            "calibrate in float32 and check the weights"
        )
    h = h.clone()
    diagonal = h.diagonal()
    diagonal[diagonal <= 0] = 1
    mean = diagonal.mean().clone()
    dtype, used = h.dtype, damp
    added = 0.0
    while True:
        diagonal += (used - added) * mean
        added = used
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not info:
            break
        if h.dtype != torch.float64:
            h = h.double()
            diagonal, mean = h.diagonal(), mean.double()
            continue
        used = max(10 * used, 1e-4)
        if used > 1e3:
            raise InputError("the Gram matrix of a layer is indefinite at any damping; check the weights")
    if used > damp:
        warnings.warn(
            SolverWarning(f"Cholesky failed at damping {damp:g}; raised to {used:g} of the mean diagonal"),
            stacklevel=2,
        )
    r = lower.flip(0, 1)
    if width == 1:
        return (r / r.diagonal()).to(dtype), r.diagonal()[:, None, None].to(dtype)
    tiles = r.unflatten(0, (-1, width)).unflatten(2, (-1, width))  # [N, w, N, w]
    own = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [N, w, w], upper triangular
    columns = r.unflatten(1, (n // width, width)).transpose(0, 1)  # [N, n, w]
    m = torch.linalg.solve_triangular(own, columns, upper=True, left=False)
    return m.transpose(0, 1).flatten(1).to(dtype), own.to(dtype)


def _beside(rows: list[tuple[Tensor, Tensor | None]], ws: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Steps and zeros [columns, out_i or 1] of several matrices beside each other, [columns, out]."""
    if len(rows) == 1:
        return rows[0]
    wide = lambda of: torch.cat([t.expand(-1, len(w)) for t, w in zip(of, ws, strict=True)], 1)  # noqa: E731
    steps, zeros = zip(*rows, strict=True)
    return wide(steps), None if zeros[0] is None else wide(zeros)


def _tensor(scale: Tensor | QTensor) -> Tensor:
    """Refitted scales are joined along the groups; only plain tensors can be."""
    if isinstance(scale, QTensor):
        raise InputError(f"scales stored as {scale.format} cannot be joined; set static_groups=true")
    return scale
