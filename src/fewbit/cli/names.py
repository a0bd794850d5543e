"""The name of a grid or of a block format, as a user types it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from fewbit.errors import InputError

if TYPE_CHECKING:
    from fewbit.format import Format
    from fewbit.grid import Grid


def find(name: str) -> tuple[Grid | None, Format | None]:
    """The grid and the block format of that name: nf4 is both, 16 values and blocks of 64 that hold them.

    Raises ``InputError`` with near names when it is neither.
    """
    from fewbit.format import FORMATS, find_format
    from fewbit.grid import ALIASES, GRIDS, by_name
    from fewbit.grid.fixed import parse_fixed

    key = name.strip().lower()
    block = find_format(key)
    parse_fixed(key)  # says what is wrong with "q9.9"
    try:
        return by_name(key), block
    except InputError:
        if block is not None:
            return None, block
        known = dict.fromkeys([*(grid.name for grid in GRIDS), *ALIASES, *FORMATS])
        near = difflib.get_close_matches(key, known, n=6, cutoff=0.5)
        remedy = f"did you mean {', '.join(near)}?" if near else "`fewbit formats` lists them all"
        raise InputError(f"there is no grid or block format named {name!r}; {remedy}") from None


def find_grid(name: str, instead: str) -> Grid:
    """The grid of that name. A block format is refused; ``instead`` says what to do with its elements."""
    grid, block = find(name)
    if grid is None:
        raise InputError(f"{name} is a block format, whose elements are {block.grid.name}; {instead}")
    return grid
