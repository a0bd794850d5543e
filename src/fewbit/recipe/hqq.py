"""HQQ: Badri, Shaji 2023, https://mobiusml.github.io/hqq_blog/. Ranges from the weights alone, in seconds.

Beyond the paper: the search starts with 0.0 on the grid at every width, columns whose weights show that they
meet large inputs count more, the step is refined beside the zero, and each group keeps its best range. What
each part brings, and why HQQ lost to plain rounding below 4 bits, is in docs/methods/hqq.md.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import weight_format
from fewbit.solve import Hqq


def hqq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    grid: str | None = None,
    zero: str = "float",
    range: str = "auto",
    scale: str = "fp16",
    divisor: str = "edge",
    format: str | None = None,
    norm: float = 2.0,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    stretch: bool = True,
    round_zero: bool = True,
    columns: float = 1.5,
) -> Recipe:
    """Every linear layer of the blocks by HQQ, weights only (W4A16 with float zeros by default), no data."""
    fmt = weight_format(
        hqq, format, range, "minmax",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    solver = Hqq(
        norm=norm, beta=beta, kappa=kappa, iterations=iterations, stretch=stretch, round_zero=round_zero,
        columns=columns,
    )  # fmt: skip
    return Recipe(name="hqq", rules=(Rule(match="*", weight=fmt, solver=solver),))
