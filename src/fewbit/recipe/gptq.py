"""GPTQ: Frantar, Ashkboos, Hoefler, Alistarh 2022, https://arxiv.org/abs/2210.17323.

LDLQ at width 1 on an integer grid. Beyond the paper: the range of each group minimises the squared error
weighted by diag(H), columns go by falling diag(H) with group scales fitted on the original weights, so that
the checkpoint needs no gather index. What each of the three brings is in docs/results.md.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import input_of, weight_format
from fewbit.solve import Ldlq
from fewbit.solve.blocktune import BlockTuning


def gptq(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    grid: str | None = None,
    zero: str = "integer",
    range: str = "auto",
    scale: str = "bf16",
    divisor: str = "full",
    format: str | None = None,
    input: str | None = None,
    damp: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    lazy: int = 128,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks by GPTQ (W4A16 by default).

    input: what layers read is rounded too: int8 or fp8 (per token; -static: stored steps), nvfp4, mxfp4...
    tune: updates of what is still float in a block after each group of its layers.
    """
    fmt = weight_format(
        gptq, format, range, "mse",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    solver = Ldlq(damp=damp, act_order=act_order, static_groups=static_groups, lazy=lazy)
    rule = Rule(match="*", weight=fmt, solver=solver, input=input_of(input))
    return Recipe(name="gptq", rules=(rule,), tuning=BlockTuning.of(tune))
