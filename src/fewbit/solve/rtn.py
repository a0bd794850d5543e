"""Round to nearest: the baseline of every table.

Fits each block's range and rounds each weight on its own. With a range rule that is weighted by H or
diag(H) it uses that, when the calibration gathered it; it never asks for data by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.solve.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Rtn(Solver):
    """Round to nearest on the format's own grid."""

    @property
    def needs(self):
        return frozenset()

    def together(self, ws, stats, fmt):
        return [fmt.quantize(w, stats.gram) for w in ws]
