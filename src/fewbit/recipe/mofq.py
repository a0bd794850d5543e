"""MoFQ: Zhang, Zhao, Cao, Wang, Cao, Yang, Yang, Zhang, Xu 2023, https://arxiv.org/abs/2305.12356.

Each layer gets the integer or the float grid of one bit width, whichever has the lesser error; the integer on
a tie. Weights alone at 4 bits; weights and inputs by the same kind at 8.
"""

from __future__ import annotations

from fewbit.errors import InputError
from fewbit.format import BF16, FP32, Channel, Format, Group, Token
from fewbit.format.activation import Activation
from fewbit.grid import by_name
from fewbit.recipe.recipe import Alternative, Recipe, Rule
from fewbit.recipe.weights import RANGE_NAMES, choice


def mofq(*, bits: int = 4, group_size: int = 128, range: str = "absmax") -> Recipe:
    """bits=4: INT4 or FP4 (E2M1) weights in groups; bits=8: INT8 or FP8 (E4M3) weights and inputs.

    The error is that of the weight at 4 bits, or of the output where ``range`` asks for calibration; of the
    output at 8 bits.
    """
    fit = choice("range", range, RANGE_NAMES)
    if bits == 4:
        block = {-1: Channel()}.get(group_size) or Group(group_size)
        int4, fp4 = (
            Format(grid=by_name(g), block=block, range=fit, scale=BF16) for g in ("int4-narrow", "e2m1")
        )
        rule = Rule(weight=int4, alternatives=(Alternative(weight=fp4),))
    elif bits == 8:
        pairs = [
            (
                Format(grid=by_name(g), block=Channel(), range=fit, scale=FP32),
                Activation(format=Format(grid=by_name(g), block=Token(), scale=FP32)),
            )
            for g in ("int8", "e4m3fn")
        ]
        (w, x), (w_fp, x_fp) = pairs
        rule = Rule(weight=w, input=x, alternatives=(Alternative(weight=w_fp, input=x_fp),))
    else:
        raise InputError(f"MoFQ is defined for bits=4 (weights) and bits=8 (weights and inputs), got {bits}")
    return Recipe(name="mofq", rules=(rule,))
