"""HIGGS: Malinovskii, Panferov, Ilin, Guo, Richtarik, Alistarh 2024, https://arxiv.org/abs/2411.17525.

Columns are spread by a random Hadamard map until the weights of a group look normal; p of them together are
rounded to the nearest of n points that have the least mean squared error for N(0, I_p). Needs no data. Beyond
the paper: solver=gptq rounds onto the same points with feedback.
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import Channel, Format, Gaussian, Group
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SCALE_NAMES, choice
from fewbit.solve import Ldlq, Rtn
from fewbit.solve.blocktune import BlockTuning
from fewbit.transform import Incoherence

SOLVERS = {"rtn": Rtn(), "gptq": Ldlq(act_order=False)}


def higgs(
    *,
    bits: float = 4,
    p: int = 2,
    n: int | None = None,
    group_size: int = -1,
    scale: str = "fp16",
    solver: str = "rtn",
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on Gaussian points, bits * p = log2(n); group_size=-1: rows.

    tune: updates of what is still float in a block after each group of its layers, which needs data.
    """
    n = round(2 ** (bits * p)) if n is None else n
    if n < 2:
        raise InputError(f"{bits} bits for {p} weights together leave {n} points; give at least 2")
    fmt = Format(
        grid=by_name(f"higgs-p{p}-n{n}" if p > 1 else f"lloyd{(n - 1).bit_length()}"),
        block=Channel() if group_size == -1 else Group(group_size),
        range=Gaussian(),
        scale=choice("scale", scale, SCALE_NAMES),
    )
    basis = Incoherence(output=False, block=None if group_size == -1 else group_size, seed=seed)
    rule = Rule(weight=fmt, basis=basis, solver=choice("solver", solver, SOLVERS))
    return Recipe(name="higgs", rules=(rule,), tuning=BlockTuning.of(tune))
