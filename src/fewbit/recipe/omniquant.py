"""OmniQuant: learned clipping of the weights (LWC) and learned scales and shifts (LET), block by block.

Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo 2023, https://arxiv.org/abs/2308.13137. Weights only,
LWC alone is the default, as the paper has it for Llamas; with quantized inputs (``input_bits``) LET matters
and starts from SmoothQuant's scales. Beyond the paper: the learned ranges start from the ones that the
weighted range search finds (``range=minmax`` is the paper's start), and the result is never worse than
rounding with those. What each part brings is in docs/methods/omniquant.md.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.format import FP32, Format, MinMax, Token, Zero
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import weight_format
from fewbit.solve.lwc import Lwc
from fewbit.transform import Smooth


def omniquant(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    grid: str | None = None,
    zero: str = "integer",
    range: str = "auto",
    scale: str = "bf16",
    divisor: str = "edge",
    format: str | None = None,
    steps: int = 100,
    batch: int = 1,
    lr: float = 0.05,
    looks: int = 2,
    let: bool = False,
    let_lr: float = 0.05,
    alpha: float = 0.5,
    input_bits: int = 16,
) -> Recipe:
    """Every linear layer of the blocks with learned ranges (W4A16, asymmetric, by default).

    let: learn scales and shifts at the seams, too, at the rate ``let_lr``; input_bits: inputs per token,
    asymmetric, at 16 as they are; alpha: exponent of SmoothQuant's scales where both are set.
    """
    fmt = weight_format(
        omniquant, format, range, "mse",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    solver = Lwc(steps=steps, batch=batch, lr=lr, looks=looks, let=let_lr if let else None)
    rule = Rule(match="*", weight=fmt, solver=solver)
    if input_bits >= 16:
        return Recipe(name="omniquant", rules=(rule,))
    own = Format(
        grid=by_name(f"int{input_bits}"), block=Token(), range=MinMax(), zero=Zero.INTEGER, scale=FP32
    )
    start = (Smooth(alpha=alpha, linear=True),) if let else ()
    return Recipe(name="omniquant", rules=(replace(rule, input=Activation(format=own)),), transforms=start)
