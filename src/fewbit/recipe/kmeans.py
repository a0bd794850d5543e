"""k-means: a learned table of 2^bits values for each row, group of rows or tensor. No steps, no zeros.

Han, Mao, Dally 2015, https://arxiv.org/abs/1510.00149 (Deep Compression); with errors weighted by how much
they matter, Kim et al. 2023, https://arxiv.org/abs/2306.07629 (SqueezeLLM), here by diag(H).
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import FP16, Channel, Clusters, Codebook, Format, PerTensor, Tiles
from fewbit.grid import Learned
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import choice
from fewbit.solve import Ldlq, Rtn

SOLVERS = {"rtn": Rtn(), "gptq": Ldlq()}


def kmeans(
    *,
    bits: int = 4,
    block: str = "row",
    overhead: float = 0.125,
    weighted: bool = True,
    iterations: int = 50,
    solver: str = "rtn",
) -> Recipe:
    """Every linear layer of the blocks on tables of its own; block: row, tensor, or rows: as many of them
    as bring the tables below ``overhead`` bits per weight.
    """
    if not 0 < overhead < 16:
        raise InputError(f"tables cannot take {overhead} bits per weight; 0.125 is usual")
    rows = Tiles(-int(-(16 << bits) // overhead), 0)
    fmt = Format(
        grid=Learned(1, bits),
        range=Clusters(iterations=iterations, weighted=weighted),
        codebook=Codebook(
            block=choice("block", block, {"row": Channel(), "rows": rows, "tensor": PerTensor()}), store=FP16
        ),
    )
    return Recipe(name="kmeans", rules=(Rule(weight=fmt, solver=choice("solver", solver, SOLVERS)),))
