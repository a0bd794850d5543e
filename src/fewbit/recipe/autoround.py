"""AutoRound: rounding and ranges learned together by signed gradient descent (SignRound), block by block.

Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, https://arxiv.org/abs/2309.05516. Beyond the paper: ranges start
from the ones that the weighted range search finds (``range=minmax`` is the paper's start), and the result is
never worse than rounding with those. What each brings is in docs/methods/autoround.md.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import weight_format
from fewbit.solve.signround import SignRound


def autoround(
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
    steps: int = 200,
    batch: int = 1,
    lr: float | None = None,
    looks: int = 2,
) -> Recipe:
    """Every linear layer of the blocks with learned rounding, weights only (asymmetric W4A16 by default)."""
    fmt = weight_format(
        autoround, format, range, "mse",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    solver = SignRound(steps=steps, batch=batch, lr=lr, looks=looks)
    return Recipe(name="autoround", rules=(Rule(match="*", weight=fmt, solver=solver),))
