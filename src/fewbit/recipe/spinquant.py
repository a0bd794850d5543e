"""SpinQuant: Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian, Blankevoort 2024,
https://arxiv.org/abs/2405.16406.

QuaRot, with the rotation of the residual stream learned on the loss of the model with quantized inputs.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.recipe.quarot import quarot
from fewbit.recipe.recipe import Recipe
from fewbit.recipe.weights import AUTO


def spinquant(
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
    steps: int = 100,
    lr: float = 1.5,
    batch: int = 8,
) -> Recipe:
    """QuaRot with its first rotation learned: steps of batch windows each, at rate lr; the whole model in
    memory.

    steps=0 is QuaRot, whose settings the others are. The inputs must be quantized, as the rotation is learned
    from their errors.
    """
    base = quarot(
        bits=bits,
        input_bits=input_bits,
        group_size=group_size,
        grid=grid,
        input_grid=input_grid,
        input_clip=input_clip,
        input_zero=input_zero,
        scale=scale,
        solver=solver,
        seed=seed,
        online=online,
    )
    rotation = replace(base.rotation, steps=steps, lr=lr, batch=batch)
    return replace(base, name="spinquant", rotation=rotation)
