"""Round to nearest: no calibration unless the range rule or static inputs ask for it. The baseline of every
comparison.
"""

from __future__ import annotations

from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import input_of, weight_format
from fewbit.solve import Rtn


def rtn(
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    grid: str | None = None,
    zero: str = "integer",
    range: str = "auto",
    scale: str = "bf16",
    divisor: str = "edge",
    format: str | None = None,
    input: str | None = None,
) -> Recipe:
    """Every linear layer of the blocks rounded to nearest.

    input: what layers read is rounded too: int8 or fp8 (per token; -static: stored steps), nvfp4, mxfp4...
    """
    fmt = weight_format(
        rtn, format, range, "minmax",
        bits=bits, grid=grid, group_size=group_size, symmetric=symmetric, zero=zero, scale=scale,
        divisor=divisor,
    )  # fmt: skip
    return Recipe(name="rtn", rules=(Rule(match="*", weight=fmt, solver=Rtn(), input=input_of(input)),))


def int8(*, group_size: int = -1, scale: str = "bf16") -> Recipe:
    """W8A16: 8-bit integers, one scale per output channel; nearly lossless and needs no data."""
    return Recipe(name="int8", rules=rtn(bits=8, group_size=group_size, scale=scale).rules)


def fp8(*, group_size: int = -1, scale: str = "bf16") -> Recipe:
    """FP8 E4M3 weights, one scale per output channel; needs no data."""
    return Recipe(name="fp8", rules=rtn(grid="e4m3fn", group_size=group_size, scale=scale).rules)


def nf4(*, group_size: int = 64, scale: str = "double", range: str = "absmax") -> Recipe:
    """NF4 with double quantization (QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    range: absmax, the paper's, needs no data; mse searches the step of least error, weighted by diag(H).
    """
    return Recipe(name="nf4", rules=rtn(grid="nf4", group_size=group_size, scale=scale, range=range).rules)
