"""What a solver is: frozen data with one pure call that chooses codes.

    solver(w [out, in], stats, format) -> QTensor

A solver states what it needs of the calibration (``needs``); the loop gathers that and nothing else. It sees
tensors only: no module, no logger. What a user must hear of (raised damping, say) is a ``SolverWarning``,
which the loop catches, prints and writes into the manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbit.format import Format, Need, QTensor, Stats


class SolverWarning(UserWarning):
    """A solver could not do exactly what was asked and says what it did."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Chooses codes for weight matrices."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Statistics this solver cannot do without."""

    def check(self, fmt: Format) -> None:
        """Raise ``InputError`` for a format this solver cannot serve; called by the plan, before any work."""

    def __call__(self, w: Tensor, stats: Stats, fmt: Format) -> QTensor:
        """Quantize ``w`` [out, in] (float32 or float64)."""
        return self.together([w], stats, fmt)[0]

    @abstractmethod
    def together(self, ws: Sequence[Tensor], stats: Stats, fmt: Format) -> list[QTensor]:
        """Quantize matrices [out_i, in] that read one input: what each would get alone, with less work."""
