"""The best choice for every layer under a budget of bits: a multiple-choice knapsack, solved exactly.

    minimize  sum_l L[l, c_l]    subject to    sum_l C[l, c_l] <= B

as an integer program with one binary variable per layer and choice (`scipy.optimize.milp`: branch and bound
over linear programs). A few hundred layers with a handful of choices take well under a second. Layers that a
runtime fuses (q, k, v; gate, up) share their choice: their rows are added before and spread after.

HIGGS: https://arxiv.org/abs/2411.17525. Road not taken: the greedy walk down the convex hull, nearly as good
with many layers and far off with few; and dynamic programming, whose states depend on the unit of cost.

Shapes: costs, losses [layers, choices]; choices [layers].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewbit.errors import InputError


def allocate(
    costs: np.ndarray, losses: np.ndarray, budget: float, together: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Index of the choice of each layer, int64 [layers]: the least total loss at a total cost of at most
    ``budget``, in the unit of ``costs`` (bits).

    ``together``: groups of layers (by index) that must choose alike. A loss of infinity rules a choice out.
    Raises ``InputError`` for shapes that do not fit, NaN, and a budget that no choices meet.
    """
    costs, losses = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if costs.ndim != 2 or costs.shape != losses.shape or not costs.size:
        raise InputError(
            f"costs {list(costs.shape)} and losses {list(losses.shape)} must both be [layers, choices]"
        )
    if not np.isfinite(costs).all() or np.isnan(losses).any() or (costs < 0).any():
        raise InputError("a cost is negative or not finite, or a loss is NaN; check what they were made from")
    of = _groups(len(costs), together)
    costs, losses = (np.stack([a[of == g].sum(0) for g in range(of.max() + 1)]) for a in (costs, losses))
    allowed = np.isfinite(losses)
    if not allowed.any(1).all():
        raise InputError("a layer has no choice with a finite loss; give it another")
    least = np.where(allowed, costs, np.inf).min(1).sum()
    if least > budget * (1 + 1e-12):
        raise InputError(
            f"the smallest choices cost {least:g} and the budget is {budget:g}; raise it or add smaller ones"
        )
    return _solve(costs, np.where(allowed, losses, 0.0), allowed, budget)[of]


def _groups(layers: int, together: Sequence[Sequence[int]]) -> np.ndarray:
    """The group of each layer, [layers], counted from 0 in the order of their first layers."""
    of = np.arange(layers)
    for group in together:
        if len(set(group)) != len(group) or any(not 0 <= i < layers or of[i] != i for i in group):
            raise InputError(
                f"layers {list(group)} cannot choose alike: give indices from 0 to {layers - 1}, each in "
                "one group"
            )
        of[list(group)] = min(group)
    return np.unique(of, return_inverse=True)[1]


def _solve(costs: np.ndarray, losses: np.ndarray, allowed: np.ndarray, budget: float) -> np.ndarray:
    """The integer program over groups; every group has an allowed choice and the smallest fit."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array

    groups, choices = costs.shape
    one_each = block_diag([np.ones((1, choices))] * groups, format="csr")
    # The solver's tolerances are absolute, 1e-6: both scales are put far above.
    total = csr_array(costs.reshape(1, -1) * (1e3 / max(budget, 1e-30)))
    spread = max(float((losses.max(1) - losses.min(1)).sum()), 1e-30)
    found = milp(
        (losses - losses.min(1, keepdims=True)).ravel() * (1e4 / spread),
        integrality=np.ones(groups * choices),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total, ub=1e3)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InputError(f"no choices were found under the budget: {found.message}")
    return found.x.reshape(groups, choices).argmax(1)
