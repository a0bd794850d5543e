"""AQLM: every vector of weights is the sum of one entry of each book; tables and codes are chosen in turn.

    min over codes, C, s of  tr( (W - Q) H (W - Q)^T ),      Q_o,g = s_o sum_m C_m[code_ogm]         eq. 2

    start     residual k-means on W / s (`Clusters`), codes by LDLQ onto these tables
    phase 1   codes, each vector against all others, by beam search under H_gg          (`refine`)
    phase 2   tables and steps for these codes, least squares                            (`update`)
    until an epoch gains less than ``tolerance``

Egiazarian, Panferov, Kuznedelev, Frantar, Babenko, Alistarh 2024, https://arxiv.org/abs/2401.06118.

Departures: the first codes carry feedback, where the paper starts from plain k-means; phase 2 solves where
the paper descends by Adam, and gets H with damping. Block tuning, phase 3,
is `fewbit.solve.blocktune`: it moves tables and norms after each group of layers, not once after the last.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from fewbit.errors import InputError
from fewbit.format import Need
from fewbit.solve.ldlq import Ldlq, damped, ldlq
from fewbit.solve.refine import refine
from fewbit.solve.solver import Solver, SolverWarning
from fewbit.solve.tables import error, update


@dataclass(frozen=True, kw_only=True)
class Aqlm(Solver):
    """epochs: turns of both phases at most; updates: steps of phase 2; tolerance: the relative gain of an
    epoch below which it ends; damp: as in Ldlq.
    """

    epochs: int = 6
    updates: int = 10
    tolerance: float = 0.01
    damp: float = 0.01

    def __post_init__(self):
        if self.epochs < 0 or self.updates < 0 or not 0 <= self.tolerance < 1 or not 0 <= self.damp <= 1:
            raise InputError(
                f"{self.epochs} epochs of {self.updates} steps to a tolerance of {self.tolerance} with "
                f"damping {self.damp} are impossible; 6, 10, 0.01 and 0.01 are usual"
            )

    @property
    def needs(self):
        return frozenset({Need.GRAM})

    def check(self, fmt):
        if fmt.codebook is None:
            raise InputError(f"Aqlm learns tables and cannot serve {fmt}; give a Learned grid and a codebook")

    def together(self, ws, stats, fmt):
        return [self._solve(w, stats.gram, fmt) for w in ws]

    def _solve(self, w, h, fmt):
        share = fmt.codebook.store.bits_per_weight(fmt.codebook.shape(fmt.grid, w.shape))
        share *= fmt.grid.entries * fmt.codebook.shape(fmt.grid, w.shape)[0] / w.numel()
        if share > 0.5:
            said = f"the tables alone take {share:.2f} bits per weight of this layer; give fewer entry bits"
            warnings.warn(SolverWarning(said), stacklevel=3)
        (q,) = ldlq([w], h, fmt, Ldlq(act_order=False, damp=self.damp))
        h = damped(h, self.damp)
        last = error(w, h, q)
        for _ in range(self.epochs):
            q = refine(w, h, update(w, h, q, self.updates), 1)
            now = error(w, h, q)
            if now > (1 - self.tolerance) * last:
                break
            last = now
        return update(w, h, q, self.updates)
