"""SmoothQuant: Xiao, Lin, Seznec, Wu, Demouth, Han 2022, https://arxiv.org/abs/2211.10438.

W8A8 integers, after channels with large inputs were scaled down at the norms (``fewbit.transform.Smooth``).
The levels are those of the paper's table 2, from the most exact to the fastest.
"""

from __future__ import annotations

from fewbit.format import FP32, AbsMax, Block, Channel, Format, PerTensor, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SOLVERS, choice
from fewbit.transform import Smooth

LEVELS = {"O1": (Token(), False), "O2": (PerTensor(), False), "O3": (PerTensor(), True)}


def smoothquant(
    *,
    level: str = "O1",
    alpha: float = 0.5,
    beta: float | None = None,
    per_channel: bool = True,
    linear: bool = False,
    solver: str = "rtn",
) -> Recipe:
    """W8A8: inputs in int8 per token (O1), per tensor (O2), or per tensor with calibrated steps (O3).

    per_channel=False: one step for each weight matrix, as in the paper's table; one a row costs nothing more.
    linear: smooth where x comes out of a linear layer, too (inputs of o and down).
    """
    block, static = choice("level", level.upper(), LEVELS)
    activation = Activation(format=_int8(block), static=static)
    weight = _int8(Channel() if per_channel else PerTensor())
    rule = Rule(weight=weight, input=activation, solver=choice("solver", solver, SOLVERS))
    return Recipe(
        name="smoothquant", rules=(rule,), transforms=(Smooth(alpha=alpha, beta=beta, linear=linear),)
    )


def _int8(block: Block) -> Format:
    return Format(grid=by_name("int8"), block=block, range=AbsMax(), scale=FP32)
