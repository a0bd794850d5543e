"""What chooses the map of a seam: frozen data with one pure call on weights and statistics.

    chooser(weights [out_k, in] of the layers that read x, their formats, statistics of x) -> s [in]

x / s and W diag(s) then take the places of x and W; of keys x and queries, K / s and Q diag(s). Choosers of
`Kind.ORDER` return an order of the columns instead, int64 [in]. A chooser sees tensors only: where the map is
folded, and that the block still computes what it did, is the business of ``fewbit.seams``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fewbit.format import Format, Need, Stats
from fewbit.format.activation import Activation


class Kind(StrEnum):
    """Where a map folds."""

    NORM = "norm"  # into the gain of the norm that returns x
    LINEAR = "linear"  # into the rows of the linear that produces x
    ATTENTION = "attention"  # into keys, and inversely into queries: x are keys after the rotary embedding
    ORDER = "order"  # a permutation, into the rows of all linears whose elementwise product x is


SCALES = frozenset({Kind.NORM, Kind.LINEAR})  # where any positive scale of single columns of x folds


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A linear layer that reads the seam: its float weight [out, in] and what it will be quantized to."""

    weight: Tensor
    format: Format | None
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Chooser(ABC):
    """Chooses s, or an order, for one seam."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Statistics of x that this chooser cannot do without."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """Seams it serves."""
        return frozenset({Kind.NORM})

    @abstractmethod
    def __call__(self, readers: Sequence[Reader], stats: Stats, tie: Tensor | None = None) -> Tensor:
        """s [in], float32, positive; or an order. ``tie`` [in] int64: columns with one number share one s
        (grouped heads). ``shared`` brings a free choice to that.
        """


def shared(s: Tensor, tie: Tensor | None) -> Tensor:
    """The geometric mean of s over columns that must share one, [in] -> [in]."""
    if tie is None:
        return s
    count = torch.zeros(int(tie.max()) + 1, device=s.device).index_add_(0, tie, torch.ones_like(s))
    mean = torch.zeros_like(count).index_add_(0, tie, s.log()) / count
    return mean.exp()[tie]
