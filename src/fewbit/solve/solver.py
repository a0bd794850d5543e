"""What a solver is: frozen data with one pure call that chooses codes.

    solver(w [out, in], stats, format) -> QTensor

A solver states what it needs of the calibration (``needs``); the loop gathers that and nothing else. It sees
tensors only: no module, no logger. What a user must hear of (raised damping, say) is a ``SolverWarning``,
which the loop catches, prints and writes into the manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from fewbit.format import Format, QTensor


class SolverWarning(UserWarning):
    """A solver could not do exactly what was asked and says what it did."""


class Need(StrEnum):
    """A statistic of the inputs of a layer."""

    GRAM = "gram"


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Calibration statistics of one layer's inputs x [tokens, in].

    gram: H = X^T X / tokens [in, in] float32, or None when nothing asked for it; tokens: how many rows it
    sums.
    """

    gram: Tensor | None = None
    tokens: int = 0

    @property
    def importance(self) -> Tensor | None:
        """Mean squared input of each column, diag(H) [in]."""
        return None if self.gram is None else self.gram.diagonal()


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Chooses codes for one weight matrix."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Statistics this solver cannot do without."""

    def check(self, fmt: Format) -> None:
        """Raise ``InputError`` for a format this solver cannot serve; called by the plan, before any work."""

    @abstractmethod
    def __call__(self, w: Tensor, stats: Stats, fmt: Format) -> QTensor:
        """Quantize ``w`` [out, in] (float32 or float64)."""
