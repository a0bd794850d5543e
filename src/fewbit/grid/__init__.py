"""Grids: the points a code can mean, at unit scale. ``GRIDS`` lists every named one, `by_name` finds one.

An unnamed grid is one line: ``Table("ternary", (-1, 0, 1))`` or ``Float(name="e5m0", exponent_bits=5, ...)``.
"""

import difflib

from fewbit.errors import InputError
from fewbit.grid.fixed import FIXED, Fixed, parse_fixed
from fewbit.grid.floating import FLOATS, Float, Specials
from fewbit.grid.grid import Description, Grid, describe
from fewbit.grid.integer import Int
from fewbit.grid.lattice import E8P, RESIDUALS, Residual
from fewbit.grid.learned import Learned, parse_learned
from fewbit.grid.points import GAUSSIAN, Points
from fewbit.grid.table import TABLES, Table, dynamic_map, lloyd_max, normal_quantiles
from fewbit.grid.trellis import Trellis, parse_trellis

INTEGERS: tuple[Int, ...] = (
    *(Int(bits) for bits in range(1, 9)),
    *(Int(bits, narrow=True) for bits in range(2, 9)),
    *(Int(bits, signed=False) for bits in range(1, 9)),
)

GRIDS: tuple[Grid, ...] = (*INTEGERS, *FIXED, *FLOATS, *TABLES, *GAUSSIAN, E8P(), *RESIDUALS)

ALIASES: dict[str, str] = {
    "e4m3": "e4m3fn",
    # MoFQ's FP4 with the codes of Inf and NaN given back to numbers is OCP's E2M1, code by code.
    "e2m1-reallocated": "e2m1",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

_BY_NAME = {grid.name: grid for grid in GRIDS}

__all__ = [
    "ALIASES", "E8P", "GRIDS", "Description", "Fixed", "Float", "Grid", "Int", "Learned", "Points",
    "Residual", "Specials", "Table", "Trellis", "by_name", "describe", "dynamic_map", "lloyd_max",
    "normal_quantiles",
]  # fmt: skip


def by_name(name: str) -> Grid:
    """The grid of that name (case does not matter), e.g. "int4", "uint4", "e2m1", "nf4".

    Beside the ones listed, fixed point of any split is named by it ("q2.5", "uq4.4"), and a trellis by its
    code, rate and state bits ("qtip-mad-2b-l16"), learned tables by width, bits and books
    ("learned-p8-b8-x2"). Raises InputError that lists the nearest names when there is none.
    """
    key = str(name).lower()
    grid = _BY_NAME.get(ALIASES.get(key, key))
    grid = grid or parse_fixed(key) or parse_trellis(key) or parse_learned(key)
    if grid is None:
        near = difflib.get_close_matches(key, [*_BY_NAME, *ALIASES], n=5, cutoff=0.5)
        remedy = f"did you mean {', '.join(near)}?" if near else "`fewbit formats` lists them"
        raise InputError(f"there is no grid named {name!r:.60}; {remedy}")
    return grid
