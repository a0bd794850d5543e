"""OmniQuant, weights only: learned clipping of the weights (LWC), block by block.

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo 2023, https://arxiv.org/abs/2308.13137. Beyond the
paper: the learned ranges start from the ones that the weighted range search finds (``range=minmax`` is the
paper's start), and the result is never worse than rounding with those. The paper's learned scales and shifts
(LET) are not here. What it brings is in docs/methods/omniquant.md.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import weight_format
from fewbit.solve.lwc import Lwc


def omniquant(
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
    steps: int = 100,
    batch: int = 1,
    lr: float = 0.05,
    looks: int = 2,
) -> Recipe:
    """Every linear layer of the blocks with learned ranges, weights only (W4A16, asymmetric, by default)."""
    fmt = weight_format(
        omniquant, format, range, "mse",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    solver = Lwc(steps=steps, batch=batch, lr=lr, looks=looks)
    return Recipe(name="omniquant", rules=(Rule(match="*", weight=fmt, solver=solver),))
