"""Activation reordering: columns that meet inputs of like magnitude share a group of weights.

    x' = x[:, order],  W' = W[:, order],      order: falling max|x_j|

A group has one step for all its columns, so a salient weight is rounded as coarsely as the widest of its
neighbours demands. Sorted, salient columns share groups. Atom, Zhao et al. 2023,
https://arxiv.org/abs/2310.19102, keeps outliers apart that way; QServe, Lin et al. 2024,
https://arxiv.org/abs/2405.04532, section 4.3.3, sorts all columns. Means nothing to one step per row.

Shapes: x [tokens, in]; order [in] int64, x' column i is x column order[i].
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.format import Need
from fewbit.transform.chooser import Chooser, Kind


@dataclass(frozen=True, kw_only=True)
class Permute(Chooser):
    """Columns by falling largest magnitude of x; equal ones keep their order."""

    @property
    def needs(self):
        return frozenset({Need.COLUMNS})

    @property
    def kinds(self):
        return frozenset({Kind.ORDER})

    def __call__(self, readers, stats, tie=None):
        return stats.abs_max.argsort(descending=True, stable=True)
