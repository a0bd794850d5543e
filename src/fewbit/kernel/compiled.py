"""Weights decoded by the compiled loops of ``rows.py``: what a format gives them, and how rows are shared.

For a few tokens a row is decoded and multiplied while it is in the first-level cache, so a token moves the
codes through memory and nothing else. For more, as many rows as the cache holds are decoded and multiplied
by torch. Threads (as many as torch uses) take rows; a row is computed by one thread alone, so the result does
not depend on how many there are.

Shapes: weight [out, in], x [tokens, in], y [tokens, out].

The road not taken: decoded weights kept from call to call. It would be as fast as the original model and as
large.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.format.block import Block2d, Channel, Flat, Group, PerTensor, Tiles
from fewbit.format.format import Format, Zero
from fewbit.format.qtensor import QTensor, value_of
from fewbit.grid.floating import Float
from fewbit.grid.grid import Grid
from fewbit.grid.integer import Int
from fewbit.grid.lattice import E8P, Residual
from fewbit.grid.points import Points
from fewbit.grid.table import Table
from fewbit.grid.trellis import Trellis

FEW = 4  # tokens: for more, torch's product of matrices pays for storing what is decoded
_PART = 2**17  # weights that are worth a thread
_NO_EIGHTS = np.empty(0, np.uint64)


def supports(fmt: Format) -> bool:
    """True for the formats whose codes and steps the loops know; of Flat blocks those that end with rows."""
    if fmt.zero is Zero.MEAN or not isinstance(fmt.block, PerTensor | Channel | Group | Flat):
        return False
    if fmt.codebook is not None:
        return isinstance(fmt.codebook.block, PerTensor | Channel | Group | Block2d | Tiles)
    return isinstance(fmt.grid, Int | Trellis) or _listed(fmt.grid)


def _listed(grid: Grid) -> bool:
    """True where a table of all points is small enough to be read faster than points are worked out."""
    if isinstance(grid, Residual):
        return all(not isinstance(part, Residual) and _listed(part) for part in (grid.first, grid.second))
    return isinstance(grid, Points | E8P | Table) or (isinstance(grid, Float) and grid.bits <= 8)


def decoder(q: QTensor) -> Callable[[int, int, Tensor, Tensor, Tensor], None] | None:
    """What decodes rows of ``q`` [out, in] on the CPU; None for a shape that the loops do not know.

    Called with first and last row + 1, x [T, in], y [T, out] and kept [1 or rows, in], all float32 and
    contiguous: sets y[:, rows] to x w^T and ``kept`` to the rows of w (one after the other where it is one).
    """
    steps = _steps(q)
    if steps is None or len(q.shape) != 2:
        return None
    from fewbit.kernel import rows

    grid, codes = q.format.grid, q.codes.contiguous().numpy()
    if isinstance(grid, Trellis):
        points = grid.points().numpy()
        loop, own = rows.windows, (points, grid.rate, grid.shift, 2**grid.state_bits - 1)
    elif q.format.codebook is not None:
        tall, wide = _tile(q)
        points = q.format.codebook.points(q.table, grid).flatten(1, 2).contiguous().numpy()
        bits = grid.entry_bits
        books = [(m * bits, 2**bits - 1, m << bits, 0.0) for m in range(grid.books)]
        loop, own = rows.sums, (points, _NO_EIGHTS, *_books(*books), tall, wide // grid.width)
    elif isinstance(grid, Int):
        loop, own = rows.numbers, ()
    else:
        loop, own = rows.sums, (*_points(grid), len(codes), codes.shape[1])

    def run(first: int, stop: int, x: Tensor, y: Tensor, kept: Tensor) -> None:
        loop(first, stop, codes, *own, *steps, x.numpy(), y.numpy(), kept.numpy())

    return run


def multiply(run: Callable, x: Tensor, shape: torch.Size) -> Tensor:
    """y [T, out] float32 of x [T, in] float32 and the weight of ``shape`` that ``run`` decodes."""
    x, y = x.contiguous(), torch.empty(len(x), shape[0])

    def part(first: int, stop: int) -> None:
        run(first, stop, x, y, torch.empty(1, shape[1]))

    _share(part, shape)
    return y


def decode(run: Callable, first: int, stop: int, columns: int) -> Tensor:
    """Rows ``first`` to ``stop`` of the weight, [rows, in] float32."""
    kept, nothing = torch.empty(stop - first, columns), torch.empty(0, columns)

    def part(start: int, end: int) -> None:
        run(first + start, first + end, nothing, nothing, kept[start:end])

    _share(part, kept.shape)
    return kept


def _share(part: Callable[[int, int], None], shape: torch.Size) -> None:
    """Call ``part`` on all rows of ``shape``, cut among the threads."""
    threads = min(torch.get_num_threads(), max(1, shape.numel() // _PART))
    if threads == 1:
        return part(0, shape[0])
    cuts = [shape[0] * i // threads for i in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(part, cuts[:-1], cuts[1:]))


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(threads)


def _steps(q: QTensor):
    """Scale, offset [out or 1, groups] and how they act, for the loops; None where blocks cross rows."""
    from fewbit.kernel.rows import AFTER, BEFORE, PLAIN

    block, n = q.format.block, q.shape[-1]
    if isinstance(block, Flat) and n % block.size:
        return None
    lines = 1 if q.scale is None or isinstance(block, PerTensor) else q.shape[0]
    own = lambda p: value_of(p).float().reshape(lines, -1).contiguous().numpy()  # noqa: E731
    kind = {Zero.NONE: PLAIN, Zero.OFFSET: AFTER}.get(q.format.zero, BEFORE)
    scale = own(torch.ones(()) if q.scale is None else q.scale)
    return scale, scale if q.zero is None else own(q.zero), kind


def _tile(q: QTensor) -> tuple[int, int]:
    """Rows and columns of the weight that share a table."""
    block, (out, n) = q.format.codebook.block, q.shape
    if isinstance(block, PerTensor | Channel):
        return out if isinstance(block, PerTensor) else 1, n
    if isinstance(block, Group):
        return 1, block.size
    block = block.of(q.shape) if isinstance(block, Tiles) else block
    return block.rows, block.cols


@functools.lru_cache(maxsize=64)
def _points(grid: Grid):
    """Points [1, entries, width] and eights of a grid, and where codes find them: see ``rows.sums``."""
    both = isinstance(grid, Residual)
    parts, books, bits, start = [torch.empty(0, grid.width)], [], 0, 0
    for part, gain in ((grid.first, 1.0), (grid.second, grid.gain)) if both else ((grid, 1.0),):
        eights = isinstance(part, E8P)
        books.append((bits, 2**part.bits - 1, start, gain if eights else 0.0))
        if not eights:
            points = part.value(part.codes()).view(-1, part.width) / gain
            beyond = 2**part.bits - len(points)  # NaN where there is no code
            parts.append(F.pad(points, (0, 0, 0, beyond), value=math.nan))
            start += len(parts[-1])
        bits += part.bits
    has = any(gain for *_, gain in books)
    return torch.cat(parts)[None].numpy(), _eights() if has else _NO_EIGHTS, *_books(*books)


@functools.lru_cache(maxsize=1)
def _eights():
    quarters = E8P().value(E8P().codes()) * 4
    return quarters.to(torch.int8).numpy().view(np.uint64)[:, 0]


def _books(*rows: tuple[int, int, int, float]):
    """The arrays ``books`` and ``gains`` of ``rows.sums``."""
    *books, gains = zip(*rows, strict=True)
    return np.array(books, np.int64).T.copy(), np.array(gains, np.float32)
