"""Weights and inputs in 8 bits, rounded to nearest: the ladder of LLM.int8(), FP8, and Quanto.

LLM.int8(): Dettmers, Lewis, Belkada, Zettlemoyer 2022, https://arxiv.org/abs/2208.07339; its table 1 is
``w8a8`` with x and w per tensor (absmax), zero=integer (zeropoint), x per token (row-wise), w per channel too
(vector-wise), and ``outliers`` (decomposition). FP8: Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433. Quanto: https://huggingface.co/blog/quanto-introduction.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.format import (
    FP32,
    MSE,
    OCTAV,
    AbsMax,
    Channel,
    Format,
    Group,
    MinMax,
    Percentile,
    PerTensor,
    Token,
    Zero,
)
from fewbit.format.activation import Activation
from fewbit.format.split import Split
from fewbit.grid import Int, by_name
from fewbit.recipe.recipe import Recipe, Rule
from fewbit.recipe.weights import choice

BLOCKS = {"tensor": PerTensor(), "channel": Channel(), "token": Token()}
RANGES = {"minmax": None, "percentile": Percentile(), "mse": MSE(weighted=False), "octav": OCTAV()}
QTYPES = {"qint8": "int8", "qint4": "uint4", "qint2": "uint2", "qfloat8": "e4m3fn", "qfloat8-e5m2": "e5m2"}


def w8a8(
    *,
    grid: str = "int8",
    weight: str = "channel",
    input: str = "token",
    static: bool = False,
    range: str = "minmax",
    zero: str = "none",
    outliers: float | None = None,
) -> Recipe:
    """W8A8: int8 or FP8 (grid=e4m3fn), rounded to nearest; inputs per token or tensor, dynamic or static.

    range: of static inputs: minmax, percentile, mse, octav. zero=integer: an affine grid for both. outliers:
    input columns that reach this magnitude are not rounded (dynamic inputs only).
    """
    w = _eight(grid, choice("weight", weight, BLOCKS), zero, None)
    x = _eight(grid, choice("input", input, BLOCKS), zero, choice("range", range, RANGES))
    rule = Rule(weight=w, input=Activation(format=x, static=static, outliers=outliers))
    return Recipe(name="w8a8", rules=(rule,))


def llm_int8(*, threshold: float = 6.0, calibrate: bool = True) -> Recipe:
    """LLM.int8(): int8 vector-wise; input columns with any |x| from ``threshold`` on stay in float.

    Their weights, too, where they are outliers of the calibration; calibrate=false needs no text and takes
    them from the int8 codes.
    """
    rule = w8a8(outliers=threshold).rules[0]
    split = Split(threshold=threshold) if calibrate else None
    return Recipe(name="llm_int8", rules=(replace(rule, split=split),))


def fp8_dynamic() -> Recipe:
    """FP8 E4M3 weights per channel and inputs per token, dynamic; no data."""
    return Recipe(name="fp8_dynamic", rules=w8a8(grid="e4m3fn").rules)


def quanto(
    *, weights: str = "qint8", activations: str | None = None, group_size: int = 128, momentum: float = 0.9
) -> Recipe:
    """Quanto: qint8, qint4, qint2 or qfloat8 weights; static qint8 or qfloat8 inputs by a moving average."""
    grid = by_name(choice("weights", weights, QTYPES))
    w = Format(grid=grid, block=Channel(), scale=FP32)
    if grid.bits < 8:  # groups with a float shift, zero not forced into the range
        w = Format(grid=grid, block=Group(group_size), range=MinMax(), zero=Zero.OFFSET, scale=FP32)
    x = None
    if activations is not None:
        x = Format(grid=by_name(choice("activations", activations, QTYPES)), scale=FP32)
        x = Activation(format=x, static=True, momentum=momentum)
    return Recipe(name="quanto", rules=(Rule(weight=w, input=x),))


def _eight(grid: str, block, zero: str, range) -> Format:
    """An 8-bit format: symmetric, or affine on the unsigned codes."""
    if choice("zero", zero, {"none": False, "integer": True}):
        return Format(
            grid=Int(8, signed=False), block=block, range=range or MinMax(), zero=Zero.INTEGER, scale=FP32
        )
    return Format(grid=by_name(grid), block=block, range=range or AbsMax(), scale=FP32)
