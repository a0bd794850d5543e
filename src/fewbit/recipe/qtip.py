"""QTIP: Tseng, Sun, Hou, De Sa 2024, https://arxiv.org/abs/2406.11235. A trellis in an incoherent basis.

Weights and Gram matrix in a Hadamard basis, as in QuIP#; tiles of 16 x 16 weights are coded together by the
best walk through a trellis, and LDLQ feeds the errors of 16 columns at a time forward. A weight is decoded
from 16 bits of the stream by a few instructions; no table is stored.
"""

from __future__ import annotations

from fewbit.format import FP32, Format, Gaussian, PerTensor
from fewbit.grid import Trellis
from fewbit.grid.trellis import Code
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import choice
from fewbit.solve import Ldlq
from fewbit.solve.blocktune import BlockTuning
from fewbit.transform import Incoherence

CODES = {str(code): code for code in Code}


def qtip(
    *,
    bits: int = 2,
    code: str = "mad",
    state_bits: int = 12,
    rho: float = 0.95,
    damp: float = 0.01,
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on a trellis; state_bits=16 is the paper's, for a GPU or patience.

    tune: updates of what is still float in a block after each group of its layers.
    """
    grid = Trellis(code=choice("code", code, CODES), rate=bits, state_bits=state_bits)
    fmt = Format(grid=grid, block=PerTensor(), range=Gaussian(rho=rho), scale=FP32)
    rule = Rule(weight=fmt, solver=Ldlq(act_order=False, damp=damp), basis=Incoherence(seed=seed))
    return Recipe(name="qtip", rules=(rule,), tuning=BlockTuning.of(tune))
