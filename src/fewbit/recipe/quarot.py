"""QuaRot: Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman 2024,
https://arxiv.org/abs/2404.00456.

The residual stream, the values and the inputs of o and down are rotated by Hadamard maps, which spreads
outliers over all channels; then weights are solved by GPTQ, and inputs rounded per token.

Two things go beyond the paper: weights are aimed at the float output (``fewbit.solve.aim``), and inputs of
four bits are clipped where a normal distribution loses least.
"""

from __future__ import annotations

from fewbit.format import FP32, MSE, Channel, Divisor, Format, Group, MinMax, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SCALE_NAMES, choice
from fewbit.solve import Aimed, Ldlq, Rtn
from fewbit.transform.rotation import Rotation

SOLVERS = {"gptq": Ldlq(), "rtn": Rtn(), "aimed": Aimed(solver=Ldlq())}
ZEROS = {"none": Zero.NONE, "integer": Zero.INTEGER}
CLIP_OF_4_BITS = 0.75  # of the largest of 576 normal values: 2.4 standard deviations


def quarot(
    *,
    bits: int = 4,
    input_bits: int = 4,
    group_size: int = -1,
    grid: str | None = None,
    input_grid: str | None = None,
    input_clip: float | None = None,
    input_zero: str = "none",
    scale: str = "bf16",
    solver: str = "aimed",
    seed: int = 0,
    online: bool = True,
) -> Recipe:
    """W4A4 in a rotated basis: weights per row by GPTQ, inputs per token; input_bits=16 leaves inputs alone.

    input_clip: share of a token's range that its codes cover, 0.75 for 4 bits and else 1; input_zero=integer:
    a zero per token. solver: aimed (GPTQ on weights that make the best of rounded inputs), gptq or rtn.
    online=false: nothing runs beside the layers; inputs of down stay as they are, those of o are rotated head
    by head.
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
        activation = Activation(format=_input(input_bits, input_grid, input_clip, input_zero))
    rule = Rule(weight=weight, input=activation, solver=choice("solver", solver, SOLVERS))
    return Recipe(name="quarot", rules=(rule,), rotation=Rotation(seed=seed, online=online))


def _input(bits: int, grid: str | None, clip: float | None, zero: str) -> Format:
    """One step per token, dynamic."""
    kind = choice("input_zero", zero, ZEROS)
    if clip is None:
        clip = CLIP_OF_4_BITS if bits == 4 and grid is None else 1.0
    points = by_name(grid or f"{'int' if kind is Zero.NONE else 'uint'}{bits}")
    return Format(grid=points, block=Token(), range=MinMax(clip=clip), zero=kind, scale=FP32)
