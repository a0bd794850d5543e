"""QuaRot: Ashkboos, Mohtashami, Croci, Li, Jaggi, Alistarh, Hoefler, Hensman 2024,
https://arxiv.org/abs/2404.00456.

The residual stream, the values and the inputs of o and down are rotated by Hadamard maps, which spreads
outliers over all channels; then weights are solved by GPTQ, and inputs rounded per token.

Three things go beyond the paper: weights are aimed at the float output (``fewbit.solve.aim``); inputs of four
bits lose the mean of each column before they are rounded, which W takes back as a constant of the layer, and
are clipped where a normal distribution loses least.
"""

from __future__ import annotations

from fewbit.format import FP32, MSE, Channel, Divisor, Format, Group, MinMax, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import AUTO, SCALE_NAMES, SOLVERS, choice
from fewbit.transform.rotation import Rotation

ZEROS = {"none": (Zero.NONE, False), "integer": (Zero.INTEGER, False), "mean": (Zero.NONE, True)}
CLIP_OF_4_BITS = 0.75  # of the largest of 576 normal values: 2.4 standard deviations


def quarot(
    *,
    bits: int = 4,
    input_bits: int = 4,
    group_size: int = -1,
    grid: str | None = None,
    input_grid: str | None = None,
    input_clip: float | None = None,
    input_zero: str = AUTO,
    scale: str = "bf16",
    solver: str = "aimed",
    seed: int = 0,
    online: bool = True,
) -> Recipe:
    """W4A4 in a rotated basis: weights per row by GPTQ, inputs per token; input_bits=16 leaves inputs alone.

    input_clip: share of a token's range that its codes cover, 0.75 for 4 bits and else 1; input_zero: none,
    integer (one per token), mean (of each column over calibration text) or auto: mean for 4 bits, else none.
    solver: aimed (GPTQ on weights that make the best of rounded inputs), gptq or rtn. online=false: nothing
    runs beside the layers; inputs of down stay as they are, those of o are rotated head by head.
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
        activation = _input(input_bits, input_grid, input_clip, input_zero)
    rule = Rule(weight=weight, input=activation, solver=choice("solver", solver, SOLVERS))
    return Recipe(name="quarot", rules=(rule,), rotation=Rotation(seed=seed, online=online))


def _input(bits: int, grid: str | None, clip: float | None, zero: str) -> Activation:
    """One step per token, dynamic; ``clip`` None and ``zero`` "auto": what the number of bits suggests."""
    four = bits == 4 and grid is None
    clip = (CLIP_OF_4_BITS if four else 1.0) if clip is None else clip
    kind, centred = choice("input_zero", zero, {AUTO: ZEROS["mean" if four else "none"], **ZEROS})
    points = by_name(grid or f"{'int' if kind is Zero.NONE else 'uint'}{bits}")
    fmt = Format(grid=points, block=Token(), range=MinMax(clip=clip), zero=kind, scale=FP32)
    return Activation(format=fmt, centred=centred)
