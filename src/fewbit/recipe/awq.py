"""AWQ: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, https://arxiv.org/abs/2306.00978.

Rounding to nearest after two searches, both by the error of outputs over the calibration tokens: a scale for
the columns of all layers that read one tensor (``fewbit.transform.Awq``, folded into what produces it), then
a range for each group (``range=output``, the paper's clip search; ``range=minmax`` leaves it out). What each
brings is in docs/methods/awq.md. Beyond the paper, ``solver=gptq`` or ``hqq`` rounds what was scaled.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SOLVERS, choice, weight_format
from fewbit.transform import Awq

RANGES = {"rtn": "output", "gptq": "mse", "hqq": "minmax"}  # that each solver starts from


def awq(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    grid: str | None = None,
    zero: str = "integer",
    range: str = "auto",
    scale: str = "bf16",
    divisor: str = "edge",
    format: str | None = None,
    points: int = 20,
    rows: int = 128,
    duo: bool = False,
    solver: str = "rtn",
) -> Recipe:
    """Every linear layer of the blocks by AWQ, weights only (W4A16, asymmetric, by default)."""
    fmt = weight_format(
        awq, format, range, choice("solver", solver, RANGES),
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    rule = Rule(match="*", weight=fmt, solver=SOLVERS[solver])
    return Recipe(name="awq", rules=(rule,), transforms=(Awq(points=points, rows=rows, duo=duo),))
