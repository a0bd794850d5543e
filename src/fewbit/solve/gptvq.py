"""GPTVQ: tables that are learned inside the loop of LDLQ, when it reaches the columns they serve.

    for each group of columns g:   C_g = EM( W_g + errors fed forward, costs D_ii )        section 3.2
        for each vector i of g:    q_i = argmin over C_g of (x - c) D_ii (x - c)^T,  feed the error forward
    C = argmin tr( (W - Q(C)) H (W - Q(C))^T ) with all codes as they are                   section 3.3

van Baalen, Kuzmin, Nagel, Couperus, Bastoul, Mahurin, Blankevoort, Whatmough 2024,
https://arxiv.org/abs/2402.15319. H = M D M^T block by block (see ldlq.py): D_ii [d, d] is what an error of
vector i costs once the vectors after it have answered, so it weighs the fit and the choice alike; the
feedback takes the block factor M whole, not its diagonal.

Departures: the codebook update solves the least squares problem (tables.py) where the paper descends by Adam;
``passes`` then choose all codes and tables in turn again, which the paper does not. A step for each row, s_o,
may stand before the tables: x is divided by it and costs count s_o^2. Left out: scales of sub-rows (their
gain pays for little more than their bits, appendix), the low-rank codebooks of d = 1.

Shapes: w_t [in, out] as in ldlq.py; vectors of a group [row groups, rows x columns / d, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError
from fewbit.format import Channel, Format, Need, QTensor, Tiles
from fewbit.grid.learned import choose, decode
from fewbit.solve.ldlq import damped, factor, feed_back
from fewbit.solve.refine import refine
from fewbit.solve.solver import Solver
from fewbit.solve.tables import update


@dataclass(frozen=True, kw_only=True)
class Gptvq(Solver):
    """damp: as in Ldlq; updates: steps of the last codebook update; passes: times that all codes are chosen
    again, each followed by an update. How tables are fitted is the range rule's.
    """

    damp: float = 0.01
    updates: int = 25
    passes: int = 0

    def __post_init__(self):
        if not 0 <= self.damp <= 1 or self.updates < 0 or self.passes < 0:
            raise InputError(
                f"damp {self.damp}, {self.updates} update steps and {self.passes} passes are impossible; "
                "0.01, 25 and 0 are usual"
            )

    @property
    def needs(self):
        return frozenset({Need.GRAM})

    def check(self, fmt):
        book = fmt.codebook
        rows = fmt.scale is None or (isinstance(fmt.block, Channel) and fmt.scale.scale is None)
        if book is None or not isinstance(book.block, Tiles) or fmt.grid.books > 1 or not rows:
            raise InputError(
                f"Gptvq learns one table for each tile as it goes and cannot serve {fmt}; give a "
                "Learned grid of one book, a codebook over Tiles and no scale, or one per row"
            )

    def together(self, ws, stats, fmt):
        return [self._solve(w, stats.gram, fmt) for w in ws]

    def _solve(self, w: Tensor, h: Tensor, fmt: Format) -> QTensor:
        width = fmt.grid.width
        fmt.check(w.shape)
        m, r = factor(h.to(w.dtype), self.damp, width)
        raw = w.square().mean(1, keepdim=True).sqrt()
        scale = None if fmt.scale is None else fmt.store(raw, w)
        rounding = _Reached(
            fmt, w.shape, r @ r.mT, torch.ones_like(raw) if scale is None else scale.to(w.dtype)
        )
        codes = feed_back(w.t().contiguous(), m, rounding, width, 128)
        table = fmt.codebook.keep(torch.stack(rounding.tables, 1).flatten(0, 1))
        codes = codes.t().contiguous().to(fmt.grid.code_dtype)
        q = QTensor(codes=codes, scale=scale, zero=None, format=fmt, shape=w.shape, table=table)
        h = damped(h, self.damp)
        for i in range(self.passes + 1):
            q = refine(w, h, q, 1) if i else q
            q = update(w, h, q, self.updates) if self.updates else q
        return q


class _Reached:
    """Tables fitted when their first column is reached, on weights that carry the errors."""

    def __init__(self, fmt: Format, shape: tuple[int, ...], cost: Tensor, s: Tensor):
        tile = fmt.codebook.block.of(shape)
        self.s, self.runs = s, s.view(shape[0] // tile.rows, -1, 1)  # [out, 1], and by table
        self.fmt, self.cost, self.span, self.groups = fmt, cost, tile.cols, shape[0] // tile.rows
        self.tables: list[Tensor] = []  # of each column group [row groups, 1, K, w], before storage

    def __call__(self, i, rest):
        w, book = self.fmt.grid.width, self.fmt.codebook
        if i % self.span == 0:
            x = (rest[: self.span].t() / self.s).reshape(self.groups, -1, w)
            own = self.cost[i // w : (i + self.span) // w]
            cost = (self.runs.square()[..., None, None] * own).flatten(1, 2)
            self.tables.append(self.fmt.range.tables(x, self.fmt.grid, cost))
            self.points = book.points(book.keep(self.tables[-1]), self.fmt.grid, x.dtype)
        x = (rest[:w].t() / self.s).reshape(self.groups, -1, w)
        code = choose(x, self.points, self.cost[i // w])
        return code.flatten(), (decode(code, self.points).flatten(0, 1) * self.s).t()
