"""What a Format refuses: combinations that mean nothing, tensors that its blocks or vectors do not tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fewbit.errors import InputError
from fewbit.format.affine import Zero
from fewbit.format.block import Channel, Flat, Group, PerTensor, Tiles
from fewbit.format.fit import MSE, Clusters, OutputMSE
from fewbit.format.leastsquares import LeastSquares
from fewbit.grid.integer import Int
from fewbit.grid.learned import Learned

if TYPE_CHECKING:
    from fewbit.format.format import Format


def check_format(fmt: Format) -> None:
    """Raise ``InputError`` for a combination of a format's fields that means nothing."""
    learned = (isinstance(fmt.grid, Learned), fmt.codebook is not None, isinstance(fmt.range, Clusters))
    if any(learned) and not (all(learned) and fmt.zero is Zero.NONE):
        raise InputError(
            f"learned tables need a Learned grid, a codebook, range=Clusters() and no zero, got "
            f"{fmt.grid.name}, {fmt.codebook}, {fmt.range} and zero {fmt.zero}"
        )
    if fmt.scale is None and fmt.zero is not Zero.NONE:
        raise InputError(f"format {fmt.grid.name} has a zero point but no scale; give scale=FP16 or another")
    if fmt.offsets is not None and (fmt.zero is not Zero.OFFSET or fmt.scale.scale is None):
        raise InputError(f"coded offsets need zero=offset and coded steps, got {fmt.zero} and {fmt.scale}")
    if fmt.zero is Zero.INTEGER and not isinstance(fmt.grid, Int):
        raise InputError(
            f"an integer zero point needs an integer grid, got {fmt.grid.name}; use Zero.OFFSET or Zero.FLOAT"
        )
    if fmt.range.of_products and not isinstance(fmt.block, Channel | Group):
        raise InputError(
            f"range {type(fmt.range).__name__} needs blocks within a row, Group(n) or Channel(), got "
            f"{fmt.block}; use MSE"
        )
    if fmt.grid.height > 1 and isinstance(fmt.range, MSE | OutputMSE | LeastSquares):
        raise InputError(
            f"range {type(fmt.range).__name__} tries steps on one block at a time, and {fmt.grid.name} "
            f"couples {fmt.grid.height} rows; use Gaussian()"
        )
    if fmt.grid.width > 1:
        if fmt.range.scalar:
            raise InputError(
                f"range {type(fmt.range).__name__} asks where points lie on a line, and those of "
                f"{fmt.grid.name} are vectors of {fmt.grid.width}; use Gaussian() or MSE()"
            )
        blocks = (fmt.block, *([] if fmt.codebook is None else [fmt.codebook.block]))
        sides = (getattr(b, "cols", getattr(b, "size", 0)) for b in blocks if not isinstance(b, Tiles))
        if within := next((side for side in sides if side % fmt.grid.width), 0):
            raise InputError(
                f"{fmt.grid.name} codes {fmt.grid.width} columns at once and blocks of {within} cut "
                f"some of them in two; use blocks of a multiple of {fmt.grid.width}"
            )


def check_shape(fmt: Format, shape: torch.Size | tuple[int, ...], what: str = "tensor") -> None:
    """Raise ``InputError`` where blocks or vectors do not tile ``shape``; ``what`` names the tensor."""
    if not shape and not isinstance(fmt.block, PerTensor | Flat):
        raise InputError(f"{what} is a single number, which {fmt} cannot cut into blocks; use PerTensor()")
    fmt.block.check(shape, what)
    width = fmt.grid.width
    if width > 1 and (not shape or shape[-1] % width):
        raise InputError(
            f"{fmt.grid.name} codes {width} columns at once, which does not divide the last side of "
            f"{what} of shape {list(shape)}; take another grid or exclude this layer with a rule"
        )
    height = fmt.grid.height
    if height > 1 and (len(shape) < 2 or shape[-2] % height):
        raise InputError(
            f"{fmt.grid.name} codes tiles of {height} rows, which do not divide the rows of {what} of "
            f"shape {list(shape)}; choose a grid without tiles or exclude this layer with a rule"
        )
    if fmt.codebook is not None:
        fmt.codebook.block.check(shape, what)
        own = fmt.codebook.block
        if isinstance(own, Tiles) and own.of(shape).cols % width:
            raise InputError(
                f"{fmt.grid.name} codes {width} columns at once and tables of {what} of shape "
                f"{list(shape)} would serve {own.of(shape).cols}; choose another width or other tiles"
            )
    for own, parts in ((fmt.scale, "steps"), (fmt.offsets, "offsets")):
        if own is not None and own.scale is not None:
            own.check(fmt.block.scale_shape(shape), f"the {parts} of {what}")
