"""QoQ (W4A8KV4): Lin, Tang, Yang, Zhang, Xiao, Gan, Han 2024, QServe, https://arxiv.org/abs/2405.04532.

4-bit weights in groups whose steps are whole multiples of their row's, so that they decode to int8; int8
inputs per token. The residual stream and the values are rotated, the inputs of down sorted so that channels
of like magnitude share groups, the inputs of o and down smoothed, and keys, too, for a cache in 4 bits.

The cache is no part of a checkpoint: KV4 is `--kv int4-token` of ``fewbit eval`` and ``fewbit generate``.
"""

from __future__ import annotations

from fewbit.format import FP16, FP32, MSE, AbsMax, Channel, Format, Token, Zero
from fewbit.format.activation import Activation
from fewbit.format.named import progressive
from fewbit.grid import Int, by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import SOLVERS, choice
from fewbit.transform import Permute, Smooth, SmoothAttention
from fewbit.transform.rotation import Rotation


def qoq(
    *,
    group_size: int = 128,
    alpha: float | None = None,
    beta: float | None = None,
    key_alpha: float = 0.5,
    rotate: bool = True,
    reorder: bool = True,
    smooth: bool = True,
    smooth_attention: bool = True,
    solver: str = "gptq",
    seed: int = 0,
) -> Recipe:
    """W4A8 of QServe, for a KV cache in 4 bits (`--kv int4-token` when the model is run).

    group_size: -1 is one step and zero a row, without a middle int8. alpha, beta: exponents of inputs and
    weights in the smoothing of what linears hand over, alpha = 0.3 with groups and 0.1 without, beta =
    1 - alpha; key_alpha: of the keys. reorder does nothing without groups. seed: of the rotation's signs.
    """
    groups = group_size != -1
    per_row = Format(grid=Int(4, signed=False), block=Channel(), range=MSE(), zero=Zero.INTEGER, scale=FP16)
    weight = progressive(group=group_size) if groups else per_row
    own = Format(grid=by_name("int8"), block=Token(), range=AbsMax(), scale=FP32)
    transforms = [Permute()] * (reorder and groups)
    if smooth:
        alpha = (0.3 if groups else 0.1) if alpha is None else alpha
        transforms.append(Smooth(alpha=alpha, beta=beta, linear=True, norms=False))
    transforms += [SmoothAttention(alpha=key_alpha)] * smooth_attention
    rule = Rule(weight=weight, input=Activation(format=own), solver=choice("solver", solver, SOLVERS))
    rotation = Rotation(seed=seed, online=False) if rotate else None
    return Recipe(name="qoq", rules=(rule,), transforms=tuple(transforms), rotation=rotation)
