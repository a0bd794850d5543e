"""AQLM: Egiazarian et al. 2024, https://arxiv.org/abs/2401.06118. A sum of one entry of each book.

2x8 books for 8 weights are 2 bits. A layer has one set of books, in FP16: 2x8 costs 65,536 bits of them a
layer, the paper's 1x16 eight million, half a bit per weight of a 4096 x 4096 layer and far too much for
small ones (``fewbit plan`` counts them).
"""

from __future__ import annotations

from fewbit.format import FP16, Channel, Clusters, Codebook, Format, PerTensor
from fewbit.grid import Learned
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import basis_of
from fewbit.solve import Aqlm
from fewbit.solve.blocktune import BlockTuning


def aqlm(
    *,
    books: int = 2,
    entry_bits: int = 8,
    d: int = 8,
    iterations: int = 15,
    epochs: int = 6,
    updates: int = 10,
    tolerance: float = 0.01,
    damp: float = 0.01,
    basis: str = "none",
    seed: int = 0,
    tune: int = 0,
) -> Recipe:
    """Every linear layer of the blocks on sums of ``books`` entries for ``d`` weights; basis: none or
    hadamard.

    tune: updates of tables, norms and what is still float in a block after each group of its layers.
    """
    fmt = Format(
        grid=Learned(d, entry_bits, books),
        block=Channel(),
        scale=FP16,
        range=Clusters(iterations=iterations),
        codebook=Codebook(block=PerTensor(), store=FP16),
    )
    solver = Aqlm(epochs=epochs, updates=updates, tolerance=tolerance, damp=damp)
    rule = Rule(weight=fmt, solver=solver, basis=basis_of(basis, seed))
    return Recipe(name="aqlm", rules=(rule,), tuning=BlockTuning.of(tune))
