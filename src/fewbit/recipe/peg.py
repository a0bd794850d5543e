"""PEG on linears: 8-bit inputs with a static step for each of K groups of columns, sorted by range first.

    p = argsort_j(max x_j - min x_j)      x_j ~ (q_j - z_g) s_g,  g the group of j after sorting by p

Bondarenko, Nagel, Blankevoort 2021, https://arxiv.org/abs/2109.12948, section 4. The paper groups the sums
and norms of encoders, which are no inputs of linears: ``fewbit.recipe.encoder``. In a decoder the outliers
are in what linears read, and that is rounded here.
"""

from __future__ import annotations

from fewbit.format import FP32, Format, MinMax, Token, Zero
from fewbit.format.activation import Activation
from fewbit.format.block import Columns
from fewbit.grid import Int
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.w8a8 import BLOCKS, RANGES
from fewbit.recipe.weights import SOLVERS, choice


def peg(
    *,
    groups: int = 6,
    weight: str = "channel",
    solver: str = "rtn",
    range: str = "minmax",
    per_token: str | None = None,
) -> Recipe:
    """W8A8: uint8 inputs with a static step and zero for each of ``groups`` groups of columns of like range.

    weight: an int8 step per channel, or per tensor as in the paper. solver: gptq also makes up for weights
    that meet outliers and are small beside their row. range: of each group: minmax, percentile, mse, octav.
    per_token: layers (a pattern: ``*down_proj``) whose inputs are int8 with a step per token instead, where
    single tokens are far larger than all others and no static step serves both.
    """
    w = Format(grid=Int(8), block=choice("weight", weight, BLOCKS), scale=FP32)
    fit = choice("range", range, RANGES) or MinMax()
    x = Format(grid=Int(8, signed=False), block=Columns(1), range=fit, zero=Zero.INTEGER, scale=FP32)
    solve = choice("solver", solver, SOLVERS)
    rules = [Rule(weight=w, input=Activation(format=x, static=True, groups=groups), solver=solve)]
    if per_token is not None:
        token = Activation(format=Format(grid=Int(8), block=Token(), scale=FP32))
        rules.insert(0, Rule(match=per_token, weight=w, input=token, solver=solve))
    return Recipe(name="peg", rules=tuple(rules))
