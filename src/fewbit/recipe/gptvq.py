"""GPTVQ: van Baalen et al. 2024, https://arxiv.org/abs/2402.15319. Tables learned inside the loop of GPTQ.

Rectangles of at most 256 columns share a table of 2^(bits d) vectors of d weights, kept in 8 bits; they hold
as many weights as bring tables and their steps below ``overhead`` bits per weight. Beyond the paper: a basis
that spreads outliers (QuIP#'s), and passes that choose all codes again.
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import FP16, Channel, Clusters, Codebook, Format, Tiles
from fewbit.grid import Int, Learned
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import basis_of
from fewbit.solve import Gptvq
from fewbit.solve.blocktune import BlockTuning

STORE = Format(grid=Int(8, narrow=True), block=Channel(), scale=FP16)


def gptvq(
    *,
    bits: int = 2,
    d: int = 2,
    overhead: float = 0.125,
    columns: int = 256,
    scale: bool = False,
    iterations: int = 50,
    updates: int = 25,
    passes: int = 0,
    damp: float = 0.01,
    basis: str = "none",
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on tables learned as LDLQ reaches them; basis: none or hadamard.

    scale: a step for each row before the tables, 16 bits.

    tune: updates of tables, norms and what is still float in a block after each group of its layers.
    """
    if not 0 < overhead < 16:
        raise InputError(f"tables cannot take {overhead} bits per weight; 0.125 and 0.25 are usual")
    grid = Learned(d, bits * d)
    steps = {"block": Channel(), "scale": FP16} if scale else {}
    fmt = Format(
        grid=grid,
        **steps,
        range=Clusters(iterations=iterations),
        codebook=Codebook(block=Tiles(-int(-(8 * grid.entries + 16) // overhead), columns), store=STORE),
    )
    solver = Gptvq(damp=damp, updates=updates, passes=passes)
    rule = Rule(weight=fmt, solver=solver, basis=basis_of(basis, seed))
    return Recipe(name="gptvq", rules=(rule,), tuning=BlockTuning.of(tune))
