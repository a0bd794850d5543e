"""QuIP: Chee, Cai, Kuleshov, De Sa 2023, https://arxiv.org/abs/2307.13304. Incoherence, then LDLQ.

Weights and Gram matrix are put into a random orthogonal basis, where no entry stands out, and are rounded
there with feedback, one step for the whole matrix: the road to 2 bits on a plain integer grid.

QuIP#: Tseng, Chee, Sun, Kuleshov, De Sa 2024, https://arxiv.org/abs/2402.04396. Hadamard maps in place of
Kronecker products, and 8 weights together on points of the E8 lattice; 3 and 4 bits code the residual again.
"""

from __future__ import annotations

from fewbit.format import FP32, Channel, Format, Gaussian, PerTensor, Zero
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import choice
from fewbit.solve import Ldlq
from fewbit.solve.blocktune import BlockTuning
from fewbit.transform import Incoherence, Spread

E8 = {
    "2": ("e8p", 1.03),
    "3": ("e8p-3b", 0.98),
    "4": ("e8p-4b", 0.93),
}  # rho: the least error on N(0, 1)
SPREADS = {str(s): s for s in Spread}
BLOCKS = {"tensor": PerTensor(), "row": Channel()}


def quip(
    *,
    bits: int = 2,
    grid: str | None = None,
    spread: str = "kronecker",
    block: str = "tensor",
    damp: float = 0.01,
    passes: int = 1,
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on integers in a random orthogonal basis, by LDLQ and its passes.

    tune: updates of what is still float in a block after each group of its layers.
    """
    fmt = Format(
        grid=by_name(grid or f"int{bits}"),
        zero=Zero.NONE if grid else Zero.OFFSET,  # levels lie on both sides of 0, none on it
        block=choice("block", block, BLOCKS),
        range=Gaussian(),
        scale=FP32,
    )
    return _recipe("quip", fmt, spread, damp, passes, seed, tune)


def quip_sharp(
    *,
    bits: int = 2,
    rho: float | None = None,
    spread: str = "hadamard",
    block: str = "tensor",
    damp: float = 0.01,
    passes: int = 1,
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on E8P in a Hadamard basis, by LDLQ of 8 columns and its passes.

    tune: updates of what is still float in a block after each group of its layers.
    """
    grid, usual = choice("bits", str(bits), E8)
    fmt = Format(
        grid=by_name(grid),
        block=choice("block", block, BLOCKS),
        range=Gaussian(rho=usual if rho is None else rho),
        scale=FP32,
    )
    return _recipe("quip_sharp", fmt, spread, damp, passes, seed, tune)


def _recipe(name: str, fmt: Format, spread: str, damp: float, passes: int, seed: int, tune: int) -> Recipe:
    rule = Rule(
        weight=fmt,
        solver=Ldlq(act_order=False, damp=damp, passes=passes),
        basis=Incoherence(spread=choice("spread", spread, SPREADS), seed=seed),
    )
    return Recipe(name=name, rules=(rule,), tuning=BlockTuning.of(tune))
