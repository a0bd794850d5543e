"""What a solver is: frozen data with one pure call that chooses codes.

    solver(w [out, in], stats, format) -> QTensor

A solver states what it needs of the calibration (``needs``); the loop gathers that and nothing else. It sees
tensors only: no module, no logger. What a user must hear of (raised damping, say) is a ``SolverWarning``,
which the loop catches, prints and writes into the manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbit.format import Format, Need, QTensor, Stats


class SolverWarning(UserWarning):
    """A solver could not do exactly what was asked and says what it did."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Chooses codes for one weight matrix.

    ``couples_rows``: what a row becomes depends on the other rows, so layers must not be solved as one stack.
    """

    couples_rows: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Statistics this solver cannot do without."""

    def check(self, fmt: Format) -> None:
        """Raise ``InputError`` for a format this solver cannot serve; called by the plan, before any work."""

    @abstractmethod
    def __call__(self, w: Tensor, stats: Stats, fmt: Format) -> QTensor:
        """Quantize ``w`` [out, in] (float32 or float64)."""
