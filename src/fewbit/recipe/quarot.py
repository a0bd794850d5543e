"""QuaRot: Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman 2024,
https://arxiv.org/abs/2404.00456.

The residual stream, the values and the inputs of down are rotated by Hadamard maps, which spreads outliers
over all channels; then weights are solved by GPTQ, and inputs rounded per token.
"""

from __future__ import annotations

from fewbit.format import FP32, MSE, AbsMax, Channel, Divisor, Format, Group, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SCALE_NAMES, choice
from fewbit.solve import Ldlq, Rtn
from fewbit.transform.rotation import Rotation

SOLVERS = {"gptq": Ldlq(), "rtn": Rtn()}


def quarot(
    *,
    bits: int = 4,
    input_bits: int = 4,
    group_size: int = -1,
    grid: str | None = None,
    input_grid: str | None = None,
    scale: str = "bf16",
    solver: str = "gptq",
    seed: int = 0,
    online: bool = True,
) -> Recipe:
    """W4A4 in a rotated basis: weights per row by GPTQ, inputs per token; input_bits=16 leaves inputs alone.

    online=false leaves the inputs of down unrotated: slightly worse, and nothing runs beside the layers.
    """
    weight = Format(
        grid=by_name(grid or f"int{bits}"),
        block={-1: Channel()}.get(group_size) or Group(group_size),
        range=MSE(),
        divisor=Divisor.FULL,
        scale=choice("scale", scale, SCALE_NAMES),
    )
    activation = None
    if input_bits < 16 or input_grid is not None:
        own = by_name(input_grid or f"int{input_bits}")
        activation = Activation(format=Format(grid=own, block=Token(), range=AbsMax(), scale=FP32))
    rule = Rule(weight=weight, input=activation, solver=choice("solver", solver, SOLVERS))
    return Recipe(name="quarot", rules=(rule,), rotation=Rotation(seed=seed, online=online))
